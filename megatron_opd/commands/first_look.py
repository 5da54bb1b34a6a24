"""The look at a run before anything of it is started: its settings, models and data, and the memory that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_opd.config import Config
from megatron_opd.config.file import load
from megatron_opd.tracking import train_log


def look(path: str | Path, overrides: Sequence[str], *, name: str = "") -> Config:
    """The config; says that it is checked, checks it, and warns where this machine has too little memory for it.

    Models that a hub has are downloaded first, and the config that is returned has their directories. `name` is what to
    call it, if not `path`. Raises what `load` and `read_inputs` raise.
    """
    config = load(path, [*overrides])
    with train_log.checking(config.run.dir, f"checking the settings of {name or path}, its models and its data"):
        # Slow imports, which the line above does not wait for.
        from megatron_opd.launch import memory_warning
        from megatron_opd.models import hub
        from megatron_opd.planner.job import build
        from megatron_opd.trainer.preflight import read_inputs

        asks = config.train.eval_teachers or config.train.eval_agreement
        needs = hub.needs(config.student, config.teachers, starts_servers=True, asks_teachers=asks)
        places, unavailable = hub.look_up(needs)
        config = config.with_models(places)
        inputs = read_inputs(config, unavailable=unavailable)
    for line in memory_warning.lines(build(config), inputs.longest_prompt):
        train_log.say_early(config.run.dir, line)
    return config
