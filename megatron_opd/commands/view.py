"""`megatron-opd view`: the answers of a run token by token, as a page for a browser."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_opd.core.arguments import Commands


def add(commands: Commands) -> None:
    """The command and its options."""
    parser = commands.add_parser("view", help="a page of a run's answers, token by token, for a browser")
    parser.add_argument("run_dir", help="run.dir of a run with log.completions_every, finished or not")
    parser.add_argument("--out", metavar="FILE", help="the page (default: RUN_DIR/view.html)")
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="the most steps in the page, evenly spread (default: 20)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the page, and say where it is."""
    from megatron_opd.tracking import view

    if arguments.steps < 1:
        raise ValueError(f"--steps must be at least 1, not {arguments.steps}")
    out = Path(arguments.out) if arguments.out else Path(arguments.run_dir) / view.PAGE
    steps = view.view(Path(arguments.run_dir), out, most_steps=arguments.steps)
    what = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps, {steps[0]} to {steps[-1]}"
    print(f"{out}: {what}; open it in a browser")
    return 0
