#!/usr/bin/env python3
"""How many right solutions the reward `code` calls right, for each way of writing an answer down; a Markdown table.

Rows have the fields of HumanEval: `prompt` (a function without its body), `canonical_solution` (the body), `test` and
`entry_point`. A way that scores less than all of them is a fault of the reward, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import tool
from rich.console import Console
from rich.progress import track

from megatron_opd.config import RewardsConfig
from megatron_opd.core.arguments import Parser
from megatron_opd.core.types import Prompt
from megatron_opd.rewards import build_reward

Row: TypeAlias = dict[str, str]


def _whole(row: Row) -> str:
    return row["prompt"] + row["canonical_solution"].rstrip() + "\n"


def _fenced(code: str, mark: str = "```", language: str = "python") -> str:
    return f"{mark}{language}\n{code.rstrip()}\n{mark}\n"


def _in_two_blocks(row: Row) -> str:
    """Imports and helpers in one block, the function in another."""
    before, define, function = _whole(row).rpartition(f"def {row['entry_point']}(")
    first = _fenced(before or "import math")
    return f"First what it needs:\n\n{first}\nThen the function:\n\n{_fenced(define + function)}"


WAYS: dict[str, Callable[[Row], str]] = {
    "the body alone": lambda row: row["canonical_solution"],
    "the body without its first indent": lambda row: row["canonical_solution"].strip(),
    "the body, then prose": lambda row: (
        row["canonical_solution"].rstrip() + "\n\nThis isn't the only way: it's short.\n"
    ),
    "the body, a stray fence, then prose": lambda row: (
        row["canonical_solution"].rstrip() + "\n```\n\nThis function does what's asked.\n"
    ),
    "the body in a block": lambda row: "The body is:\n\n" + _fenced(row["canonical_solution"]),
    "a program without a block, prose around it": lambda row: (
        f"Here's my solution.\n\n{_whole(row)}\nLet me know if it's of use!\n"
    ),
    "a program in a block": lambda row: f"Sure:\n\n{_fenced(_whole(row))}\nI hope that this helps.",
    "a program in a block, then an example of use": lambda row: (
        f"{_fenced(_whole(row))}\nFor example:\n\n{_fenced('print(' + row['entry_point'] + '())')}"
        f"\nwhich prints\n\n{_fenced('Traceback: 1 argument', language='text')}"
    ),
    "a block with tildes": lambda row: _fenced(_whole(row), "~~~~", "py"),
    "a block with four backticks": lambda row: _fenced(_whole(row), "````"),
    "an indented block in a list": lambda row: "1. The code:\n\n" + textwrap.indent(_fenced(_whole(row)), "   "),
    "several blocks that belong together": _in_two_blocks,
    "a block that is not closed": lambda row: f"```python\n{_whole(row)}",
    "after thinking with a wrong program": lambda row: (
        f"<think>\n{_fenced('def ' + row['entry_point'] + '(*_): return None')}No.\n</think>\n\n{_fenced(_whole(row))}"
    ),
}


def read(path: Path) -> list[Row]:
    """The rows of a JSON Lines file, which may be gzipped. Raises OSError and ValueError."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line) for line in lines]


def wrong(rows: list[Row], way: Callable[[Row], str], settings: RewardsConfig) -> list[str]:
    """The entry points of the rows whose right solution is called wrong."""
    prompts = [
        Prompt(
            source="rows",
            index=i,
            text=row["prompt"],
            token_ids=(),
            extra={"tests": row["test"], "entry_point": row["entry_point"]},
        )
        for i, row in enumerate(rows)
    ]
    answers = [(prompt, way(row)) for prompt, row in zip(prompts, rows, strict=True)]
    rewards = build_reward("code", settings).grade(answers)
    return [row["entry_point"] for row, reward in zip(rows, rewards, strict=True) if reward != 1]


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="JSON Lines with HumanEval's fields, e.g. HumanEval.jsonl.gz")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for an answer (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="answers at a time (default: %(default)s)")
    return tool.run(_table, parser.parse_args(argv))


def _table(arguments: argparse.Namespace) -> int:
    rows = read(arguments.path)
    settings = RewardsConfig(code_timeout_s=arguments.timeout, code_workers=arguments.workers)
    found = {
        name: wrong(rows, way, settings)
        for name, way in track(WAYS.items(), description="ways of writing", console=Console(stderr=True))
    }
    print("| the answer is | right |\n|---|---|")
    for name, those in found.items():
        print(f"| {name} | {len(rows) - len(those)} of {len(rows)} |")
    for name, those in found.items():
        if those:
            print(f"{name}: {', '.join(those)}", file=sys.stderr)
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
