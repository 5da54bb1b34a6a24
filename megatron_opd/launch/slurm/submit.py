"""`megatron-opd launch --slurm`: from a config to a submitted job."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from megatron_opd.config import RunConfig
from megatron_opd.core import run_dir
from megatron_opd.launch.local import Process
from megatron_opd.launch.slurm import script as jobs
from megatron_opd.launch.slurm.layout import place

SCRIPT = "job.sh"
_GPUS_PER_NODE = 8
_SUBMIT_S = 60.0


def slurm(run: RunConfig, processes: Sequence[Process], given: Sequence[str], options: argparse.Namespace) -> int:
    """Print the steps or the script, or write it to <run.dir>/job.sh and submit that; returns the exit code.

    `processes` are the run's, `given` the config file and overrides. Raises ValueError for what does not fit nodes, and
    without Slurm.
    """
    gpus_per_node = _GPUS_PER_NODE if options.gpus_per_node is None else options.gpus_per_node
    if gpus_per_node < 1:
        raise ValueError(f"--gpus-per-node must be at least 1, not {gpus_per_node}")
    steps = place(processes, given, gpus_per_node=gpus_per_node, nodes=options.nodes)
    if options.steps:
        print(jobs.table(run, steps))
        return 0
    how = {"gpus_per_node": gpus_per_node, "sbatch": options.sbatch, "setup": options.setup}
    text = jobs.script(run, given, steps, **how)
    if options.dry_run:
        print(text, end="")
        return 0
    path = run_dir.make(run.dir) / SCRIPT
    path.write_text(text)
    print(*jobs.describe(steps, gpus_per_node), sep="\n", file=sys.stderr)
    try:
        return subprocess.run(["sbatch", str(path)], timeout=_SUBMIT_S).returncode
    except FileNotFoundError:
        raise ValueError(f"there is no sbatch on this machine; submit {path} where there is") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"sbatch did not answer in {_SUBMIT_S:g} s; submit {path} later") from None
