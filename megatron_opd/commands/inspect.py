"""`megatron-opd inspect`: what is in a checkpoint, by its headers."""

from __future__ import annotations

import argparse
import json
import sys

from megatron_opd.commands import offline
from megatron_opd.core.arguments import Commands

_EXAMPLES = """\
examples:
  megatron-opd inspect models/Qwen3-8B
  megatron-opd inspect runs/mine/checkpoints/step_00000100
  megatron-opd inspect checkpoints/Qwen3-8B --json | jq .parameters

Reads headers only. Exit code 1 when something is wrong with the checkpoint.
"""


def add(commands: Commands) -> None:
    """The command and its options."""
    parser = commands.add_parser("inspect", help="show what is in a checkpoint of either format")
    offline.examples(parser, _EXAMPLES)
    parser.add_argument("dir", metavar="DIR")
    parser.add_argument("--like", metavar="HF_DIR", help="directory with the config.json, if DIR has none")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the facts and, on stderr, the problems."""
    from rich.console import Console
    from rich.table import Table

    from megatron_opd.models.describe import describe

    with offline.work():
        facts = describe(offline.model_dir(arguments.dir), arguments.like)
    problems = facts["problems"]
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return int(bool(problems))
    table = Table(show_header=False, box=None, title=str(arguments.dir), title_justify="left")
    words = {True: "yes", False: "no"}
    for name, value in facts.items():
        if name != "problems":
            shown = words[value] if isinstance(value, bool) else f"{value:,}" if isinstance(value, int) else str(value)
            table.add_row(name, shown)
    Console(soft_wrap=True).print(table)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return int(bool(problems))
