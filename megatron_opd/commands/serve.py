"""`megatron-opd serve`: a run's SGLang servers, kept until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import time

from megatron_opd.core.arguments import Commands, add_config


def add(commands: Commands) -> None:
    """The command and its options."""
    parser = commands.add_parser("serve", help="start the SGLang servers of a config and keep them until Ctrl-C")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="rollout or teacher-NAME; repeatable"
    )
    add_config(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Start the servers, and again those that end, until it is ended itself."""
    from megatron_opd.config.file import load
    from megatron_opd.launch import local
    from megatron_opd.models import hub
    from megatron_opd.sglang import serve
    from megatron_opd.sglang.keeper import Keeper

    config = load(arguments.config, arguments.overrides)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job step's end is an end like Ctrl-C
    served = [t.model for t in config.teachers if t.is_served] + [config.student.model] * config.rollout.is_served
    config = config.with_models(hub.directories(dict.fromkeys(served, "weights"), config.model_settings))
    try:
        with serve.running(config, say=local.say, only=arguments.only) as servers:
            if not servers:
                raise ValueError(
                    "this config starts no servers: rollout.engine and teachers.N.backend are not sglang,"
                    " or the servers have urls"
                )
            local.say(f"{len(servers)} server(s) up; Ctrl-C ends them")
            keeper = Keeper(servers, restarts=config.run.max_restarts, say=local.say)
            while not keeper.lost():
                time.sleep(1.0)
                keeper.look()
            raise ValueError(f"no server is left for {', '.join(keeper.lost())}")
    except KeyboardInterrupt:
        return 0
