#!/usr/bin/env python3
"""How much of sampling hides behind training: the run's own loop over stages that only take time.

    python tools/bench_overlap.py
    python tools/bench_overlap.py --generate 0.3 --train 0.2 --sync 0.02 --steps 30

Sampling (with its served teachers), training and weight sync sleep; drawing prompts, waiting, sharing between ranks and
counting are the real code. The first steps, in which the pipe fills, are left out. Exits with 1 when a step with
rollout.max_staleness 1 takes more than --at-most times the slowest stage.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

from megatron_opd import config as c
from megatron_opd.core.types import Prompt, Rollout
from megatron_opd.prompts.mix import PromptMix
from megatron_opd.student import cpu, groups
from megatron_opd.tracking.tracker import Tracker
from megatron_opd.trainer.completions import Completions
from megatron_opd.trainer.episode_metrics import EpisodeWatch
from megatron_opd.trainer.experience import Experience, Leader
from megatron_opd.trainer.loop import Run
from megatron_opd.trainer.stopwatch import Stopwatch

FILLING = 3
PROMPTS = [Prompt(source="all", index=i, text="", token_ids=(1, 2)) for i in range(64)]


class Stages:
    """Engine and student in one, each call as long as its stage."""

    def __init__(self, seconds: argparse.Namespace) -> None:
        self.seconds = seconds
        self.version = 0

    def generate(self, prompts: list[Prompt], sampling: Any, on_finished: Any = None) -> list[Rollout]:
        version = self.version
        time.sleep(self.seconds.generate)
        answer = {
            "token_ids": (3, 4),
            "learnt": (True, True),
            "logps": (0.0, 0.0),
            "finish": "stop",
            "versions": (version, version),
        }
        return [Rollout(prompt=prompt, sample=0, **answer) for prompt in prompts]

    skipped = ""

    def step(self, batches: Any, objective: Any, told: Any) -> dict[str, float]:
        time.sleep(self.seconds.train)
        return {"num_tokens": 1.0, "loss": 0.0, "logprob/student": 0.0, "logprob/teacher": 0.0}

    def export(self) -> Any:
        return iter(())

    def load(self, weights: Any, version: int) -> None:
        time.sleep(self.seconds.sync)
        self.version = version

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


class StubExperience(Experience):
    """Samples from stages, and scores nothing."""

    def score(self, rollouts: Any, teachers: Any = None) -> list[Any]:
        return []


class StubRun(Run):
    """The loop of a run without its models."""

    def __init__(self, config: c.Config, parallel: Any, stages: Stages) -> None:
        self.config, self.parallel, self.tracker = config, parallel, Tracker()
        self.student = stages  # type: ignore[assignment]
        self.objective = SimpleNamespace(distillation=None)  # type: ignore[assignment]
        self.shaping = None
        self.episodes = EpisodeWatch(parallel, self.tracker, is_on=False, has_rewards=False)
        self.completions = Completions(config.log, config.run.dir, parallel, None, self.tracker)
        leader = Leader(engine=stages, answers=None, grader=None, evaluator=None, tokenizer=None)  # type: ignore[arg-type]
        self.experience = StubExperience(config, parallel, [], leader)
        self.timed, self.trained, self.began_at = Stopwatch(), 0, 0
        self.experience.start(PromptMix([(c.SourceConfig(name="all", path=""), PROMPTS)], seed=1))


def measure(parallel: Any, seconds: argparse.Namespace, *, max_staleness: int) -> tuple[float, float]:
    """(seconds of a step, mean version lag) once the pipe is full."""
    config = c.Config(
        run=c.RunConfig(dir="unused"),
        student=c.StudentConfig(model="unused"),
        teachers=[],
        rollout=c.RolloutConfig(engine="sglang", prompts_per_step=8, max_staleness=max_staleness),
        data=c.DataConfig(train=[]),
        train=c.TrainConfig(steps=seconds.steps + FILLING + 1),
        rewards=c.RewardsConfig(watch=False),
        log=c.LogConfig(answer_every=0),
    )
    run = StubRun(config, parallel, Stages(seconds))
    for _ in range(FILLING):
        run.step()
    started = time.perf_counter()
    lags = [run.step()["rollout/version_lag"] for _ in range(seconds.steps)]
    took = (time.perf_counter() - started) / seconds.steps
    run.experience.settle()
    run.close()
    return took, sum(lags) / len(lags)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for stage, default in (("generate", 0.2), ("train", 0.2), ("sync", 0.01)):
        parser.add_argument(f"--{stage}", type=float, default=default, metavar="S", help="seconds (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps to measure (%(default)s)")
    parser.add_argument("--at-most", type=float, default=1.15, help="goal: times the slowest stage (%(default)s)")
    arguments = parser.parse_args()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    cpu.enable()
    parallel = groups.start(c.ParallelConfig(), c.RunConfig(dir="unused", timeout_s=60))
    slowest = max(arguments.generate, arguments.train, arguments.sync)
    print(f"generate {arguments.generate} s, train {arguments.train} s, sync {arguments.sync} s\n")
    print("| rollout.max_staleness | seconds a step | of the slowest stage | version lag |\n|---|---|---|---|")
    ratios = {}
    for max_staleness in (0, 1, 2):
        took, lag = measure(parallel, arguments, max_staleness=max_staleness)
        ratios[max_staleness] = took / slowest
        print(f"| {max_staleness} | {took:.3f} | {took / slowest:.2f} | {lag:.2f} |")
    groups.stop()
    return int(ratios[1] > arguments.at_most)


if __name__ == "__main__":
    sys.exit(main())
