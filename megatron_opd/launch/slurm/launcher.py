"""`megatron-opd launch --slurm`: its options. What it does is in `submit.py`, which is imported when it does it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_opd.config import Config


class SlurmLauncher:
    """A run as a Slurm job."""

    summary = "write the script of a Slurm job, and submit it"

    def add_options(self, parser: argparse._ActionsContainer) -> None:
        """What can be said about the cluster and the job."""
        parser.add_argument("--gpus-per-node", type=int, metavar="N", help="of the cluster (default 8)")
        parser.add_argument("--nodes", type=int, metavar="N", help="fail unless the run takes so many")
        parser.add_argument(
            "--sbatch",
            action="append",
            default=[],
            metavar="OPTION",
            help="more of the header: --sbatch=--partition=h100; repeatable",
        )
        parser.add_argument("--setup", default="", metavar="CODE", help="shell code that makes the environment")
        parser.add_argument("--steps", action="store_true", help="print the job's steps, as its script reads them")

    def launch(self, config: Config, given: Sequence[str], options: argparse.Namespace) -> int:
        """Write and submit the job, or print it or its steps."""
        from megatron_opd.launch.local import plan
        from megatron_opd.launch.slurm.submit import slurm

        return slurm(config.run, plan(config, given), given, options)
