"""`megatron-opd report`: table and plot of a run."""

from __future__ import annotations

import argparse

from megatron_opd.core.arguments import Commands


def add(commands: Commands) -> None:
    """The command and its options."""
    parser = commands.add_parser("report", help="table and plot of a run, finished or not")
    parser.add_argument("run_dir", help="run.dir of the run")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the plot."""
    from rich.console import Console

    from megatron_opd.tracking.report import report

    report(arguments.run_dir, console=Console())
    return 0
