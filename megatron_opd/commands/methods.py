"""`megatron-opd methods`: the presets that a config can name."""

from __future__ import annotations

import argparse

from megatron_opd.core.arguments import Commands


def add(commands: Commands) -> None:
    """The command and its options."""
    parser = commands.add_parser("methods", help="list the methods that a config can name, or print one")
    parser.add_argument("name", nargs="?", help="print the settings of this method, with their comments")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the list, or one method's file."""
    from megatron_opd.config import methods

    if arguments.name:
        print(methods.text(arguments.name), end="")
        return 0
    for name in methods.names():
        what, source = methods.about(name)
        print(f"{name:20} {what}\n{'':20} {source}")
    return 0
