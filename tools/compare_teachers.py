#!/usr/bin/env python3
"""Two teachers of a real model, alone, routed by source, averaged by logits and averaged by probabilities.

The teachers are SmolLM2 and a specialist that this trainer makes from it (examples/llm/specialist.yaml), the student is
SmolLM2 without some of its layers (examples/llm/two_teachers.yaml). Every model is measured against both teachers, by
source, with the trainer's own evaluation.

A finished cell is a line of JSON and is not run again; an interrupted run continues. So the same command can be stopped
and repeated, and asked for some of the cells at a time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import tool
from comparison.lines import add, read
from comparison.training import check_models
from teacher_comparison import show
from teacher_comparison.cells import CELLS, known
from teacher_comparison.runs import Setting, finished, make_specialist

_EXAMPLES = """\
examples:
  python tools/fetch_smollm2.py models/SmolLM2-135M-Instruct
  python tools/prune_model.py models/SmolLM2-135M-Instruct models/SmolLM2-pruned --drop 12 15 18 21
  python tools/compare_teachers.py                              all cells, then the table and the plot
  python tools/compare_teachers.py --cells before routed        some of them
  python tools/compare_teachers.py --cells                      the table alone
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [cell.name for cell in CELLS]
    parser.add_argument("--cells", nargs="*", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"), help="(%(default)s)")
    parser.add_argument("--student", type=Path, default=Path("models/SmolLM2-pruned"), help="(%(default)s)")
    parser.add_argument("--steps", type=tool.positive, default=6, metavar="N", help="of a student (%(default)s)")
    parser.add_argument("--prompts", type=tool.positive, default=8, metavar="N", help="a step (%(default)s)")
    parser.add_argument("--held-out", type=tool.positive, default=16, metavar="N", help="of a source (%(default)s)")
    parser.add_argument("--specialist-steps", type=tool.positive, default=12, metavar="N", help="(%(default)s)")
    parser.add_argument("--threads", type=tool.positive, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--timeout", type=tool.positive, default=3600, metavar="S", help="of a run (%(default)s)")
    parser.add_argument("--dir", type=Path, default=Path("runs/two_teachers"), help="of the runs (%(default)s)")
    parser.add_argument("--json", type=Path, help="lines of finished cells (two_teachers.jsonl in --dir)")
    parser.add_argument("--plot", type=Path, help="(two_teachers.png in --dir)")
    return tool.run(_run, parser.parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    setting = Setting(
        folder=arguments.dir.resolve(),
        model=arguments.model.resolve(),
        student=arguments.student.resolve(),
        steps=arguments.steps,
        prompts=arguments.prompts,
        held_out=arguments.held_out,
        specialist_steps=arguments.specialist_steps,
        threads=arguments.threads,
        timeout_s=arguments.timeout,
    )
    path = arguments.json or setting.folder / "two_teachers.jsonl"
    left = [cell for cell in known(arguments.cells) if cell.name not in read(path, setting.told())]
    if left:
        check_models(setting.model, setting.student, told_by="tools/compare_teachers.py")
        make_specialist(setting)
    for number, cell in enumerate(left, start=1):
        print(f"{number} of {len(left)}: {cell.label}", file=sys.stderr, flush=True)
        add(path, finished(cell, setting))
    lines = read(path, setting.told())
    show.table(CELLS, lines)
    if lines:
        show.plot(CELLS, lines, arguments.plot or setting.folder / "two_teachers.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
