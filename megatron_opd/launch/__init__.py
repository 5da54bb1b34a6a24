"""Starting a run: its processes on this machine, or a Slurm job."""
