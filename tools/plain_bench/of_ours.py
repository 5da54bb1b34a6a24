"""This trainer's loop on one rank, without end of sequence: run by `bench_vs_plain.py` as `of_ours.py FOLDER DTYPE`."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from stages import Stages

from megatron_opd import config as c
from megatron_opd.student import cpu, groups
from megatron_opd.tracking.tracker import Tracker
from megatron_opd.trainer.preflight import read_inputs

if TYPE_CHECKING:
    from megatron_opd.trainer.loop import Run


class CpuSeconds:
    """CPU seconds of each stage, the last time it ran: what other programs on the machine do matters less to them."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Times the block as `stage`."""
        started = time.process_time()
        yield
        self.times[stage] = time.process_time() - started


def main(folder: str, dtype: str) -> None:
    """Prints the figures; `dtype` is that of the rollouts."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    cpu.enable()
    from megatron_opd.trainer.loop import Run

    stages = Stages(folder)
    torch.set_num_threads(stages.settings["threads"])
    config = _config(Path(folder), stages, dtype)
    Path(config.run.dir).mkdir(exist_ok=True)
    parallel = groups.start(config.parallel, config.run)
    inputs = dataclasses.replace(read_inputs(config), eos_ids=())
    stages.prompt_tokens = sum(len(prompt.token_ids) for _, prompts in inputs.train for prompt in prompts)
    run = Run(config, parallel, inputs, Tracker())
    run.sync()
    run.timed = CpuSeconds()  # type: ignore[assignment]
    for number in range(config.train.steps):
        found = _sampled(run, number) if stages.settings["generate_only"] else _step(run)
        stages.add(**{name: run.timed.times[name] for name in ("generate", "score", "step") if name in run.timed.times})
    stages.tell(**{"mismatch/kl": found["mismatch/kl"]})
    run.close()
    groups.stop()


def _step(run: Run) -> dict[str, float]:
    metrics = run.step()
    assert metrics["rollout/length"] == run.config.rollout.max_new_tokens
    return metrics


def _sampled(run: Run, number: int) -> dict[str, float]:
    """Sampling alone, and what the trainer's model says of it after the last step."""
    with run.timed("generate"):
        rollouts = run.experience.sample(number)
    last = number + 1 == run.config.train.steps
    return run.student.evaluate(run.experience.score(rollouts), run.objective) if last else {}


def _config(folder: Path, stages: Stages, dtype: str) -> c.Config:
    settings = stages.settings
    steps = settings["steps"] + settings["warmup"]
    return c.Config(
        run=c.RunConfig(dir=str(folder / "run")),
        student=c.StudentConfig(model=settings["model"]),
        teachers=[c.TeacherConfig(name="teacher", model=settings["model"])],
        rollout=c.RolloutConfig(
            prompts_per_step=settings["batch"], max_new_tokens=settings["response"], dtype=cast(Any, dtype)
        ),
        data=c.DataConfig(train=[c.SourceConfig(name="all", path=settings["prompts"])], chat_template="tokenizer"),
        optim=c.OptimConfig(lr=settings["lr"]),
        train=c.TrainConfig(steps=steps, micro_batch_size=settings["micro"], export=False),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
