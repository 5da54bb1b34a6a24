"""This trainer's loop on one rank, without end of sequence: run by `bench_vs_trl.py` as `of_ours.py FOLDER`."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from figures import Figures

from megatron_opd import config as c
from megatron_opd.student import cpu, groups
from megatron_opd.tracking.tracker import Tracker
from megatron_opd.trainer.preflight import read_inputs


def main(folder: str) -> None:
    """Prints the figures."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    cpu.enable()
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401  what is imported counts before

    from megatron_opd.trainer.loop import Run

    figures = Figures(folder)
    config = _config(Path(folder), figures.settings)
    Path(config.run.dir).mkdir(exist_ok=True)
    parallel = groups.start(config.parallel, config.run)
    inputs = dataclasses.replace(read_inputs(config), eos_ids=())
    run = Run(config, parallel, inputs, Tracker())
    run.sync()
    figures.begin()
    for _ in range(config.train.steps):
        metrics = run.step()
        assert metrics["rollout/length"] == figures.settings["response"]
        figures.step(metrics["loss"], metrics["time/generate"])
    figures.tell()
    run.close()
    groups.stop()


def _config(folder: Path, settings: dict[str, float]) -> c.Config:
    batch = int(settings["batch"])
    return c.Config(
        run=c.RunConfig(dir=str(folder / "run")),
        student=c.StudentConfig(model=str(folder / "student")),
        teachers=[c.TeacherConfig(name="teacher", model=str(folder / "teacher"))],
        rollout=c.RolloutConfig(prompts_per_step=batch, max_new_tokens=int(settings["response"])),
        data=c.DataConfig(train=[c.SourceConfig(name="all", path=str(folder / "prompts.jsonl"))]),
        optim=c.OptimConfig(lr=settings["lr"]),
        train=c.TrainConfig(steps=int(settings["steps"] + settings["warmup"]), micro_batch_size=batch, export=False),
    )


if __name__ == "__main__":
    main(sys.argv[1])
