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
    if arguments.launcher == launchers.DEFAULT and not arguments.dry_run:  # others start it where we cannot look
        from megatron_opd.commands import first_look

        config = first_look.look(arguments.config, arguments.overrides)
    else:
        config = load(arguments.config, arguments.overrides)
    launcher = launchers.LAUNCHERS[arguments.launcher]
    return launcher.launch(config, [arguments.config, *arguments.overrides], arguments)
