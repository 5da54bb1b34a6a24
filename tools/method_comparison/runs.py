"""One run of the comparison: its config, the process that trains it, and what its metrics say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from comparison.training import ROOT, train
from method_comparison.methods import Method

from megatron_opd.tracking.tracker import read_metrics

_BASE = ROOT / "examples/quickstart.yaml"
_HELD_OUT = 50
"""Prompts of each task that are evaluated."""
_DRAWN = 2
"""Answers to each held-out prompt at temperature 1."""
_STAGES = ("generate", "score", "step", "sync")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all runs share."""

    folder: Path
    steps: int
    prompts: int
    samples: int
    minibatches: int
    epochs: int
    eval_every: int
    target: float
    timeout_s: int

    @property
    def name(self) -> str:
        """Of the folder of its runs: other settings are other runs."""
        return f"b{self.prompts}g{self.samples}m{self.minibatches}e{self.epochs}s{self.steps}v{self.eval_every}"


@dataclass(frozen=True, slots=True)
class Case:
    """One run."""

    method: Method
    lr: float
    seed: int

    def folder(self, setting: Setting) -> Path:
        return setting.folder / setting.name / self.method.name / f"lr{self.lr:g}" / f"seed{self.seed}"


@dataclass(frozen=True, slots=True)
class Point:
    """Where a run is at one evaluation."""

    step: int
    accuracy: float
    """Fraction of right answers among those drawn at temperature 1."""
    greedy: float
    tokens: float
    """Sampled until then, by the student or, for SFT on their samples, by teachers."""
    seconds: float
    """Spent until then on one core; loading and evaluation do not count."""
    by_source: dict[str, float]


def curve(case: Case, setting: Setting) -> list[Point]:
    """Train, unless that was done before, and read the metrics. Raises ValueError when the run fails."""
    folder = case.folder(setting)
    points = _read(folder)
    if points and points[-1].step == setting.steps:
        return points
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(_base(case.method, folder), sort_keys=False))
    (folder / "log.txt").unlink(missing_ok=True)
    train(config, folder, _settings(case, setting), threads=1, timeout_s=setting.timeout_s)
    return _read(folder)


def _base(method: Method, folder: Path) -> dict[str, Any]:
    """The quickstart's file, with the teachers that this method has, and fewer held-out prompts: there are many
    evaluations."""
    base: dict[str, Any] = yaml.safe_load(_BASE.read_text())
    if method.only:
        base["teachers"] = [teacher for teacher in base["teachers"] if teacher["name"] in method.only]
    for source in base["data"]["eval"]:
        few = folder / f"{source['name']}.jsonl"
        few.write_text("".join((ROOT / source["path"]).read_text().splitlines(keepends=True)[:_HELD_OUT]))
        source["path"] = str(few.absolute())
    return base


def _settings(case: Case, setting: Setting) -> list[str]:
    return [
        f"run.seed={1000 + case.seed}",
        "parallel.tensor=1",
        "parallel.pipeline=1",
        f"rollout.prompts_per_step={setting.prompts}",
        f"rollout.samples_per_prompt={setting.samples}",
        f"optim.lr={case.lr}",
        "optim.warmup_steps=3",
        f"train.steps={setting.steps}",
        f"train.minibatches={setting.minibatches}",
        f"train.epochs={setting.epochs}",
        f"train.micro_batch_size={max(setting.prompts * setting.samples // setting.minibatches, 1)}",
        f"train.eval_every={setting.eval_every}",
        f"train.eval_samples={_DRAWN}",
        "train.eval_teachers=false",
        "train.save_every=0",
        "train.export=false",
        *case.method.settings,
    ]


def _read(folder: Path) -> list[Point]:
    path = folder / "metrics.jsonl"
    points: list[Point] = []
    tokens = seconds = 0.0
    for row in read_metrics(path) if path.exists() else []:
        spent = sum(row.get(f"time/{stage}", 0.0) for stage in _STAGES)
        seconds += spent
        tokens += row.get("tokens_per_s", 0.0) * spent
        if f"eval/avg@{_DRAWN}/all" in row:
            prefix = f"eval/avg@{_DRAWN}/"
            by_source = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
            accuracy = by_source.pop("all")
            point = Point(int(row["step"]), accuracy, row["eval/accuracy/all"], tokens, seconds, by_source)
            points.append(point)
    return points
