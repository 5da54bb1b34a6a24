"""`megatron-opd example`: a commented config with its data, written where the user is."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from megatron_opd.commands import offline
from megatron_opd.core.arguments import Commands

_WIDTH = 110
_EXAMPLES = """\
examples:
  megatron-opd example                       lists them
  megatron-opd example quickstart            writes examples/quickstart.yaml, and models and prompts for it
  megatron-opd train examples/quickstart.yaml

What is there already stays as it is.
"""


def add(commands: Commands) -> None:
    """The command and its options."""
    parser = commands.add_parser("example", help="write a commented example, with its data, into this folder")
    offline.examples(parser, _EXAMPLES)
    parser.add_argument("name", nargs="?", help="which one; without a name, all are listed")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the example, or list all."""
    from megatron_opd.config import examples

    if arguments.name is None:
        names = examples.names()
        width = max(map(len, names))
        for name in names:
            print(f"{name:<{width}}  {textwrap.shorten(examples.about(name), _WIDTH - width, placeholder=' …')}")
        return 0
    name = arguments.name.removeprefix(f"{examples.FOLDER}/").removesuffix(".yaml")
    written, kept = examples.write(name, Path())
    config = Path(examples.FOLDER) / f"{name}.yaml"
    stays = f"{len(kept)} were there and stay as they are" if kept else ""
    print(f"{config}: {len(written)} files written below {examples.FOLDER}/{'; ' if stays else ''}{stays}")
    print(f"look at it, then: megatron-opd check {config}")
    return 0
