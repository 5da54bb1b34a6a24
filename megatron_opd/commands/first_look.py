"""The look at a run before anything of it is started: its settings, models and data, and the memory that it needs."""

from __future__ import annotations

from megatron_opd.config import Config
from megatron_opd.tracking import train_log


def look(config: Config, path: str) -> Config:
    """Say that the config at `path` is checked, check it, and warn where this machine has too little memory for it.

    Models that the hub has are downloaded first. Returns the config with their directories.
    Raises what `read_inputs` raises.
    """
    with train_log.checking(config.run.dir, f"checking the settings of {path}, its models and its data"):
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
