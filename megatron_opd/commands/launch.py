"""`megatron-opd launch`: train with restarts on this machine, or elsewhere."""

from __future__ import annotations

import argparse

from megatron_opd.core.arguments import Commands, add_config, refuse
from megatron_opd.launch import launchers


def add(commands: Commands) -> None:
    """The command, its options, and those of every launcher."""
    parser = commands.add_parser("launch", help="train with restarts on this machine, or as a Slurm job (--slurm)")
    launchers.add_options(parser)
    add_config(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Start the run by the launcher that is asked for."""
    from megatron_opd.config.file import load

    for name, other in launchers.LAUNCHERS.items():
        if name != arguments.launcher:
            refuse(arguments, f"--{name}", launchers.defaults_of(other))
    config = load(arguments.config, arguments.overrides)
    given, launcher = [arguments.config, *arguments.overrides], launchers.LAUNCHERS[arguments.launcher]
    if arguments.launcher != launchers.DEFAULT or arguments.dry_run:  # others start it where we cannot look
        return launcher.launch(config, given, arguments)
    from megatron_opd.commands import first_look
    from megatron_opd.launch.interruption import until_interrupted

    def look_and_launch() -> int:
        return launcher.launch(first_look.look(arguments.config, arguments.overrides), given, arguments)

    return until_interrupted(config.run.dir, look_and_launch)
