"""The ways to start a run, by the option of `megatron-opd launch` that asks for them: `--slurm`; without one, `local`.

Nothing heavy is imported before a launcher starts something: the command line asks all of them for their options.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from megatron_opd.launch.slurm.launcher import SlurmLauncher

if TYPE_CHECKING:
    from megatron_opd.config import Config

DEFAULT = "local"


class Launcher(Protocol):
    """Starts a run somewhere."""

    summary: str
    """What it does, for the help of its option."""

    def add_options(self, parser: argparse._ActionsContainer) -> None:
        """Add the options that only this launcher has."""

    def launch(self, config: Config, given: Sequence[str], options: argparse.Namespace) -> int:
        """Start the run and return the exit code; with `options.dry_run` print what would be started.

        `given` are the config file and overrides as the user gave them. Raises ValueError for a run that it cannot
        start.
        """


class LocalLauncher:
    """Servers and ranks on this machine, with restarts."""

    summary = "train on this machine"

    def add_options(self, parser: argparse._ActionsContainer) -> None:
        """It has none of its own."""

    def launch(self, config: Config, given: Sequence[str], options: argparse.Namespace) -> int:
        """Start everything, and wait for its end."""
        from megatron_opd.launch import local

        if options.dry_run:
            print(*local.plan(config, given), sep="\n")
            return 0
        return local.launch(config, given, max_restarts=config.run.max_restarts)


LAUNCHERS: dict[str, Launcher] = {DEFAULT: LocalLauncher(), "slurm": SlurmLauncher()}


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option for every launcher but the default one, and the options of all."""
    parser.add_argument("--dry-run", action="store_true", help="print what would be started or submitted")
    which = parser.add_mutually_exclusive_group()
    which.set_defaults(launcher=DEFAULT)
    for name, launcher in LAUNCHERS.items():
        if name != DEFAULT:
            which.add_argument(f"--{name}", dest="launcher", action="store_const", const=name, help=launcher.summary)
        launcher.add_options(parser)


def defaults_of(launcher: Launcher) -> dict[str, Any]:
    """The options that only this launcher has, with their values where they are not given."""
    parser = argparse.ArgumentParser(add_help=False)
    launcher.add_options(parser)
    return vars(parser.parse_args([]))
