"""`megatron-opd train`: the launcher's part, and a rank's."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from megatron_opd.core.arguments import Commands, add_config

if TYPE_CHECKING:
    from megatron_opd.core.preemption import Notice


def add(commands: Commands) -> None:
    """The command and its options."""
    parser = commands.add_parser("train", help="run a config to its last step; continues from its newest checkpoint")
    add_config(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Start the run's processes; as one of them, be a rank."""
    from megatron_opd.launch import worker

    if worker.is_worker():
        return _work(arguments)
    from megatron_opd.commands import first_look
    from megatron_opd.config.file import load
    from megatron_opd.launch.interruption import until_interrupted

    def look_and_launch() -> int:
        config = first_look.look(arguments.config, arguments.overrides)
        from megatron_opd.launch import local

        return local.launch(config, [arguments.config, *arguments.overrides])

    return until_interrupted(load(arguments.config, arguments.overrides).run.dir, look_and_launch)


def _work(arguments: argparse.Namespace) -> int:
    """One rank. Whatever goes wrong on all ranks alike is said once."""
    _begin(arguments)
    from megatron_opd.launch import one_rank

    return one_rank.live(lambda notice: _train_here(arguments, notice))


def _begin(arguments: argparse.Namespace) -> None:
    """Rank 0 says what it does next, before the imports that take seconds."""
    if os.environ["RANK"] != "0":
        return
    from megatron_opd.config.file import load
    from megatron_opd.tracking import train_log

    with suppress(ValueError):  # which is said when all ranks are there
        config = load(arguments.config, arguments.overrides)
        train_log.say_early(config.run.dir, "importing torch and Megatron")


def _train_here(arguments: argparse.Namespace, notice: Notice) -> None:
    from megatron_opd.config.file import load
    from megatron_opd.core.parallel import PeerError
    from megatron_opd.core.preemption import Preempted
    from megatron_opd.student import cpu, groups

    try:
        config = load(arguments.config, arguments.overrides)
        groups.check_world_size(config.parallel)
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of every machine: each has its own files
            raise
        raise PeerError(str(error)) from None
    cpu.enable()
    from megatron_opd.trainer.loop import train

    try:
        train(config, notice)
    except Preempted:
        groups.stop()
        raise
