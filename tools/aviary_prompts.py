#!/usr/bin/env python3
"""Rows of prompts for an environment of aviary: what each task's environment begins with (docs/environments.md)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import tool

from megatron_opd.config.yaml_text import load_value
from megatron_opd.rollout.environments.aviary import rows

_EXAMPLES = """\
examples:
  python tools/aviary_prompts.py train.jsonl --dataset gsm8k --options split=train --count 1000
  python tools/aviary_prompts.py prompts.jsonl --environment calculator --tasks questions.txt
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="JSON lines to write")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--dataset", default="", help="name that aviary knows, or module:Class; a task is a number")
    which.add_argument("--environment", default="", help="the same of an environment; a task is a text")
    parser.add_argument(
        "--options", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of the dataset, as in the config"
    )
    parser.add_argument("--count", type=tool.positive, default=1, help="number of tasks of the dataset")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--tasks", type=Path, help="file with a task a line, for an environment")
    return tool.run(_write, parser.parse_args(argv))


def _write(arguments: argparse.Namespace) -> int:
    """Write the rows. Raises ValueError where tasks and kind do not fit."""
    if bool(arguments.environment) != bool(arguments.tasks):
        raise ValueError("an environment needs --tasks, and a dataset has no use for it")
    if arguments.tasks:
        tasks: Sequence[int | str] = arguments.tasks.read_text(encoding="utf-8").splitlines()
    else:
        tasks = range(arguments.first, arguments.first + arguments.count)
    options = dict(option.partition("=")[::2] for option in arguments.options)
    options = {name: load_value(value) for name, value in options.items()}
    found = rows(tasks, dataset=arguments.dataset, environment=arguments.environment, **options)
    lines = [json.dumps(row, ensure_ascii=False) for row in found]
    arguments.file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} rows in {arguments.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
