#!/usr/bin/env python3
"""Which method gets the student to the target first: the same student, prompts and samples a step for all of them.

Every method first tries each learning rate on a seed of its own (0); the one that reaches the target in the fewest
steps is then run on the other seeds, and only those are reported. Teachers are the quickstart's two specialists:
methods are compared with each prompt routed to the teacher of its task, and ways to combine teachers with reverse KL.

A finished run is kept and read again the next time, an interrupted one continues, so the same command can be stopped
and repeated. Runs are single processes on one thread each, --jobs of them at a time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import tool
from method_comparison import schedule, show
from method_comparison.methods import METHODS
from method_comparison.runs import Setting

_EXAMPLES = """\
examples:
  python tools/compare_methods.py --dry-run                                   what would run
  python tools/compare_methods.py --json a.json --plot a.png                  all of it
  python tools/compare_methods.py --methods grpo reverse_kl --seeds 1 2 3 4 5
  python tools/compare_methods.py --prompts 4 --minibatches 4 --epochs 4 --dir runs/few_samples
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return tool.run(_run, _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=tool.positive, default=[1, 2, 3], metavar="N", help="(1 2 3)")
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-4, 6e-4, 1.2e-3], metavar="LR", help="rates to try")
    parser.add_argument(
        "--target", type=float, default=0.7, metavar="A", help="accuracy at temperature 1 (%(default)s)"
    )
    same = parser.add_argument_group("the same for all")
    same.add_argument("--steps", type=tool.positive, default=60, metavar="N", help="steps per run (%(default)s)")
    same.add_argument("--prompts", type=tool.positive, default=8, metavar="N", help="per step (%(default)s)")
    same.add_argument("--samples", type=tool.positive, default=4, metavar="N", help="per prompt (%(default)s)")
    same.add_argument("--minibatches", type=tool.positive, default=4, metavar="N", help="updates a pass (%(default)s)")
    same.add_argument("--epochs", type=tool.positive, default=1, metavar="N", help="passes over a step (%(default)s)")
    same.add_argument("--eval-every", type=tool.positive, default=2, metavar="N", help="steps (%(default)s)")
    parser.add_argument("--dir", default="runs/methods", help="where runs are kept (%(default)s)")
    parser.add_argument("--jobs", type=tool.positive, default=2, metavar="N", help="runs at a time (%(default)s)")
    parser.add_argument("--timeout", type=tool.positive, default=1800, metavar="S", help="limit per run (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all results")
    parser.add_argument("--plot", metavar="FILE", help="draw accuracy over steps and over sampled tokens")
    parser.add_argument("--dry-run", action="store_true", help="print the runs, start nothing")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    setting = Setting(
        folder=Path(arguments.dir),
        steps=arguments.steps,
        prompts=arguments.prompts,
        samples=arguments.samples,
        minibatches=arguments.minibatches,
        epochs=arguments.epochs,
        eval_every=arguments.eval_every,
        target=arguments.target,
        timeout_s=arguments.timeout,
    )
    methods = [METHODS[name] for name in arguments.methods]
    if arguments.dry_run:
        show.planned(setting, methods, arguments.lrs, arguments.seeds)
        return 0
    found = schedule.compare(setting, methods, arguments.lrs, arguments.seeds, jobs=arguments.jobs)
    show.results(found)
    if arguments.json:
        show.write(arguments.json, found)
    if arguments.plot:
        show.plot(found, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
