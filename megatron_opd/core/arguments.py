"""How every command takes a config: a file, then settings that replace some of its own, before or behind options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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


def add_config(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """The positional arguments `config` and `overrides`; without a default, the config must be given."""
    shown = f"YAML file (default: {default})" if default else "YAML file (see examples/)"
    parser.add_argument("config", nargs="?" if default else None, default=default, help=shown)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a setting of the file, e.g. train.steps=20"
    )
