"""`megatron-opd check`: a config against its models and data, and what it needs; nothing is started."""

from __future__ import annotations

import argparse

from megatron_opd.core.arguments import Commands, add_config, refuse
from megatron_opd.planner import options as planner

_ROWS_TO_TRY = 1000
"""The most rows of a source whose tests it tries; other commands try fewer."""


def add(commands: Commands) -> None:
    """The command and its options."""
    parser = commands.add_parser("check", help="validate a config against its models and data; starts nothing")
    parser.add_argument("--settings-only", action="store_true", help="do not check models, tokenizers and data")
    parser.add_argument("--all", action="store_true", help="print every setting, not only those that are no default")
    add_config(parser)
    parser.add_argument("--plan", action="store_true", help="what it needs and how long a step takes; needs no weights")
    planner.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the settings, notes, and what would be started."""
    if arguments.plan:
        return planner.run(arguments)
    refuse(arguments, "--plan", planner.DEFAULTS)
    from megatron_opd.config.file import dump, load, method_in, not_defaults, read, to_dict
    from megatron_opd.launch import local, memory_warning
    from megatron_opd.models import hub
    from megatron_opd.planner.job import build
    from megatron_opd.trainer.other_data import check_newest
    from megatron_opd.trainer.preflight import read_inputs

    config = load(arguments.config, arguments.overrides)
    origins = [f"# {line}" for line in method_in(read(arguments.config, arguments.overrides))]
    if arguments.settings_only:
        processes = local.plan(config, [arguments.config, *arguments.overrides])
        print(*origins, "# models, tokenizers and data were not looked at", *processes, sep="\n")
        return 0
    places, unavailable = hub.look_up(dict.fromkeys(config.model_settings, "texts"))
    found = config.with_models(places)
    inputs = read_inputs(found, rows_to_try=_ROWS_TO_TRY, unavailable=unavailable)
    if config.data.on_change == "error":
        check_newest(config.run.dir, inputs.data)
    print(dump(to_dict(config) if arguments.all else not_defaults(config)))
    others = [] if arguments.all else ["# all other settings have their defaults (--all prints them)"]
    print(*others, *origins, sep="\n")
    for kind, sources in (("train", inputs.train), ("eval", inputs.eval)):
        for source, prompts in sources:
            print(f"# data.{kind}: {source.name}: {len(prompts)} prompts")
    job = build(found)
    for note in (*inputs.notes, *hub.notes(found.model_settings), *memory_warning.lines(job, inputs.longest_prompt)):
        print(f"# {note}")
    print(f"# vocabulary: {inputs.vocab_size} entries; a response ends with {inputs.eos_ids}")
    processes = local.plan(config, [arguments.config, *arguments.overrides])
    for line in (memory_warning.plan(job, inputs.longest_prompt), *processes, *local.not_here(processes)):
        print(f"# {line}")
    return 0
