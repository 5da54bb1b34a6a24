"""How every command takes a config: a file, then settings that replace some of its own, before or behind options."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """An argument parser whose commands take overrides anywhere: `check run.yaml --plan optim.lr=1e-4`.

    argparse itself gives a list of positional arguments only those that stand side by side.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's; what is left over and is no option joins `overrides`, where the command has them."""
        found, rest = super().parse_known_args(args, namespace)
        if "overrides" in found:
            found.overrides = [*found.overrides, *(text for text in rest if not text.startswith("-"))]
            rest = [text for text in rest if text.startswith("-")]
        return found, rest


class Commands:
    """The commands of a program, which --help lists below headings, a line each."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser
        parser.usage = f"{parser.prog} [--help | --version] COMMAND ..."
        self._added = parser.add_subparsers(required=True, metavar="COMMAND", prog=parser.prog, help=argparse.SUPPRESS)

    def begin(self, heading: str) -> None:
        """The next commands are below this heading."""
        self._parser.description = f"{self._parser.description}\n\n{heading}:"

    def add_parser(self, name: str, *, help: str, **options: Any) -> argparse.ArgumentParser:
        """The parser of a new command. `help` is its line; `options` are argparse's."""
        self._parser.description = f"{self._parser.description}\n  {name:<17} {help}"
        described = help[0].upper() + help[1:] + "."
        return self._added.add_parser(name, **{"description": described, **options})


def refuse(arguments: argparse.Namespace, needed: str, defaults: Mapping[str, Any]) -> None:
    """Raises ValueError for options that do nothing without the option `needed`."""
    given = [f"--{name.replace('_', '-')}" for name, default in defaults.items() if vars(arguments)[name] != default]
    if given:
        raise ValueError(f"{', '.join(given)} {'requires' if len(given) == 1 else 'require'} {needed}")


def add_config(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """The positional arguments `config` and `overrides`; without a default, the config must be given."""
    shown = f"YAML file (default: {default})" if default else "YAML file (`megatron-opd example` writes one)"
    parser.add_argument("config", nargs="?" if default else None, default=default, help=shown)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a setting of the file, e.g. train.steps=20"
    )
