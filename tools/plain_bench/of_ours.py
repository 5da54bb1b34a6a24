"""This trainer's loop on one rank, without end of sequence: run by `bench_vs_plain.py` as `of_ours.py FOLDER`."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import torch
from stages import Stages

from megatron_opd import config as c
from megatron_opd.student import cpu, groups
from megatron_opd.tracking.tracker import Tracker
from megatron_opd.trainer.preflight import read_inputs


def main(folder: str) -> None:
    """Prints the figures."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    cpu.enable()
    from megatron_opd.trainer.loop import Run

    stages = Stages(folder)
    torch.set_num_threads(stages.settings["threads"])
    config = _config(Path(folder), stages)
    Path(config.run.dir).mkdir(exist_ok=True)
    parallel = groups.start(config.parallel, config.run)
    run = Run(config, parallel, dataclasses.replace(read_inputs(config), eos_ids=()), Tracker())
    run.sync()
    for _ in range(config.train.steps):
        metrics = run.step()
        assert metrics["rollout/length"] == stages.settings["response"]
        stages.add(**{name: metrics[f"time/{name}"] for name in ("generate", "score", "step")})
    stages.tell()
    run.close()
    groups.stop()


def _config(folder: Path, stages: Stages) -> c.Config:
    settings = stages.settings
    steps = settings["steps"] + settings["warmup"]
    return c.Config(
        run=c.RunConfig(dir=str(folder / "run")),
        student=c.StudentConfig(model=settings["model"]),
        teachers=[c.TeacherConfig(name="teacher", model=settings["model"])],
        rollout=c.RolloutConfig(prompts_per_step=settings["batch"], max_new_tokens=settings["response"]),
        data=c.DataConfig(train=[c.SourceConfig(name="all", path=settings["prompts"])]),
        optim=c.OptimConfig(lr=settings["lr"]),
        train=c.TrainConfig(steps=steps, micro_batch_size=settings["micro"], export=False),
    )


if __name__ == "__main__":
    main(sys.argv[1])
