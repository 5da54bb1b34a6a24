"""`megatron-opd check CONFIG --plan` and `tools/plan_memory.py`: the options, and what they print."""

from __future__ import annotations

import argparse
import json

from megatron_opd.planner.gpus import GPUS

DEFAULTS = {"gpu": "H100", "prompt": None, "response": None, "json": False}
"""Of the options, where they are not given."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What can be said about a plan besides the config. None of it changes a run."""
    group = parser.add_argument_group("plan", "memory, traffic and time, from the config.json files alone")
    group.add_argument("--gpu", metavar="NAME", help=f"{', '.join(GPUS)} (%(default)s)")
    group.add_argument("--prompt", type=float, metavar="TOKENS", help="mean prompt (data.max_prompt_tokens)")
    group.add_argument("--response", type=float, metavar="TOKENS", help="mean answer (rollout.max_new_tokens)")
    group.add_argument("--json", action="store_true", help="print the plan as JSON: bytes, FLOPs and seconds")
    parser.set_defaults(**DEFAULTS)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 1 where something does not fit."""
    from rich.console import Console

    from megatron_opd.config.file import load
    from megatron_opd.models import hub
    from megatron_opd.planner.job import build
    from megatron_opd.planner.plan import as_dict, plan
    from megatron_opd.planner.table import show
    from megatron_opd.sglang.weights.transports import way_of

    config = load(arguments.config, arguments.overrides)
    config = config.with_models(hub.directories(dict.fromkeys(config.model_settings, "config"), config.model_settings))
    way_of(config.rollout)  # raises for one that is not known, or that cannot reach the servers
    lengths = {"prompt": arguments.prompt, "response": arguments.response}
    made = plan(build(config, gpu=arguments.gpu, **lengths))
    if arguments.json:
        print(json.dumps(as_dict(made), indent=2))
    else:
        show(made, Console())
    return int(bool(made.problems))
