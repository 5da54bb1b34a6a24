#!/usr/bin/env python3
"""Methods on a real model: the same damaged student, teacher, prompts and number of student tokens, several seeds.

The student is SmolLM2 without some of its layers, the teacher the original. Every method first tries three learning
rates on a seed of their own; the one that recovers most is run on the other seeds, and only those are reported.

A finished cell is a line of JSON in docs/results/llm.jsonl and is not run again; an interrupted one continues from its
checkpoint. So the same command can be stopped and repeated, and asked for some of the cells at a time. Cells run one
at a time, the most wanted first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import tool
from comparison.lines import add, read
from comparison.training import ROOT, check_models
from llm_cells import show
from llm_cells.cells import Cell, Lines, in_order
from llm_cells.methods import METHODS, Method
from llm_cells.runs import finished, trained_steps
from llm_cells.setting import Setting

_EXAMPLES = """\
examples:
  python tools/fetch_smollm2.py models/SmolLM2-135M-Instruct
  python tools/prune_model.py models/SmolLM2-135M-Instruct models/SmolLM2-pruned --drop 12 15 18 21
  python tools/llm_results.py --dry-run                      the cells, their state and how long they will take
  python tools/llm_results.py                                all that are left
  python tools/llm_results.py --only reverse_kl,sft --seeds 1,2
  python tools/llm_results.py --show                         write table and plot into docs/results.md; run nothing
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return tool.run(_run, _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=_methods, default=list(METHODS.values()), metavar="METHOD,…", help="methods")
    parser.add_argument("--seeds", type=_seeds, default=[1, 2, 3], metavar="N,…", help="(1,2,3)")
    do = parser.add_mutually_exclusive_group()
    do.add_argument("--list", action="store_true", help="name the methods and what they set; run nothing")
    do.add_argument("--dry-run", action="store_true", help="the cells, their state and how long they take; run nothing")
    do.add_argument("--show", action="store_true", help="write table and plot into the page; run nothing")
    same = parser.add_argument_group("the same for all cells")
    same.add_argument("--steps", type=tool.positive, default=8, metavar="N", help="(%(default)s)")
    same.add_argument("--prompts", type=tool.positive, default=16, metavar="N", help="a step (%(default)s)")
    same.add_argument("--tokens", type=tool.positive, default=32, metavar="N", help="of an answer (%(default)s)")
    same.add_argument("--minibatches", type=tool.positive, default=2, metavar="N", help="a step (%(default)s)")
    same.add_argument("--evaluations", type=tool.positive, default=2, metavar="N", help="after the first (%(default)s)")
    same.add_argument("--held-out", type=tool.positive, default=48, metavar="N", help="prompts (%(default)s)")
    same.add_argument("--sampled", type=tool.positive, default=240, metavar="N", help="by the teacher (%(default)s)")
    where = parser.add_argument_group("places")
    where.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"), help="(%(default)s)")
    where.add_argument("--student", type=Path, default=Path("models/SmolLM2-pruned"), help="(%(default)s)")
    where.add_argument("--dir", type=Path, default=Path("runs/llm_results"), help="of the runs (%(default)s)")
    where.add_argument("--json", type=Path, default=ROOT / "docs/results/llm.jsonl", help="lines of finished cells")
    where.add_argument("--page", type=Path, default=ROOT / "docs/results.md", help="page with the table (--show)")
    where.add_argument("--plot", type=Path, default=ROOT / "docs/images/llm_methods.png", help="(--show)")
    parser.add_argument("--threads", type=tool.positive, default=1, metavar="N", help="(%(default)s)")
    parser.add_argument("--timeout", type=tool.positive, default=7200, metavar="S", help="of a run (%(default)s)")
    return parser


def _methods(text: str) -> list[Method]:
    unknown = [name for name in text.split(",") if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    return [METHODS[name] for name in METHODS if name in text.split(",")]


def _seeds(text: str) -> list[int]:
    return [tool.positive(seed) for seed in text.split(",")]


def _run(arguments: argparse.Namespace) -> int:
    setting = _setting(arguments)
    if arguments.list:
        show.methods(arguments.only)
    elif arguments.dry_run:
        show.planned(arguments.only, arguments.seeds, _lines(arguments, setting), setting)
    elif arguments.show:
        lines = _lines(arguments, setting)
        show.into_page(arguments.page, show.tables(lines))
        show.plot(lines, arguments.plot)
        print(f"written: {arguments.page}, {arguments.plot}")
    else:
        _run_cells(arguments, setting)
    return 0


def _setting(arguments: argparse.Namespace) -> Setting:
    names = ("steps", "prompts", "tokens", "minibatches", "evaluations", "held_out", "sampled", "threads")
    if arguments.steps % arguments.evaluations:
        raise ValueError(f"--steps {arguments.steps} is not a multiple of --evaluations {arguments.evaluations}")
    return Setting(
        folder=arguments.dir.resolve(),
        model=arguments.model.resolve(),
        student=arguments.student.resolve(),
        timeout_s=arguments.timeout,
        **{name: getattr(arguments, name) for name in names},
    )


def _lines(arguments: argparse.Namespace, setting: Setting) -> Lines:
    """Finished cells; not those of a method that set something else then."""
    found = read(arguments.json, setting.told())
    sets = {name: list(method.settings) for name, method in METHODS.items()}
    return {name: line for name, line in found.items() if sets.get(line["method"]) == line["overrides"]}


def _run_cells(arguments: argparse.Namespace, setting: Setting) -> None:
    check_models(setting.model, setting.student, told_by="tools/llm_results.py")
    while left := _left(arguments, lines := _lines(arguments, setting)):
        cell = left[0]
        minutes = sum(show.minutes(one, trained_steps(one, setting), lines, setting) for one in left)
        print(f"{cell.name}: {len(left)} cells left, about {minutes:.0f} core minutes", file=sys.stderr, flush=True)
        line = finished(cell, setting)
        add(arguments.json, line)
        print(f"{cell.name}: {show.in_short(line)}", file=sys.stderr, flush=True)
    print(show.tables(lines))


def _left(arguments: argparse.Namespace, lines: Lines) -> list[Cell]:
    """The first one is next."""
    return [cell for cell in in_order(arguments.only, arguments.seeds, lines) if cell.name not in lines]


if __name__ == "__main__":
    sys.exit(main())
