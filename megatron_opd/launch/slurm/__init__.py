"""Runs on a cluster: which process goes where, and the Slurm job that starts them."""
