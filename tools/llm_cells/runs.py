"""One cell: the process that trains it, the teacher's samples before that, and the line that it leaves."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import tool
from comparison.training import ROOT, core_seconds, environment, train
from llm_cells.cells import Cell
from llm_cells.setting import CONFIG, Setting, of_lr, shares

from megatron_opd.core.run_dir import CHECKPOINTS
from megatron_opd.core.whole_file import write_whole
from megatron_opd.tracking.tracker import read_metrics

_STAGES = ("generate", "score", "step", "sync")
_MEASURES = {
    "kl": "eval/kl/original",
    "agreement": "eval/agreement/original",
    "forced_agreement": "eval/forced_agreement/original/all",
    "nll": "eval/nll/all",
}
"""Names in the lines, and the metrics."""
_ATTEMPTS = "attempts.jsonl"
_ANSWERS = "teacher_answers.json"  # as trainer/teacher_answers.py calls it, which takes seconds to import
_FIRST_SEED = 1000
"""`run.seed` of the seed 0."""


def finished(cell: Cell, setting: Setting) -> dict[str, Any]:
    """The cell's line, after training it from where it is. Raises ValueError when a run fails."""
    samples = make_samples(setting)
    folder = setting.place(cell)
    folder.mkdir(parents=True, exist_ok=True)
    _pass_on(setting.samples / _ANSWERS, folder / _ANSWERS)
    overrides = [*setting.overrides(), *of_lr(cell.lr), f"run.seed={_FIRST_SEED + cell.seed}", *cell.method.settings]
    if [point["step"] for point in points(folder, setting)][-1:] != [setting.steps]:
        with _Attempt(folder / _ATTEMPTS):
            train(CONFIG, folder, overrides, threads=setting.threads, timeout_s=setting.timeout_s)
    _pass_on(folder / _ANSWERS, setting.samples / _ANSWERS)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # 1.4 GB
    return {
        "cell": cell.name,
        "method": cell.method.name,
        "lr": cell.lr,
        "seed": cell.seed,
        "overrides": list(cell.method.settings),
        "settings": setting.told(),
        "points": points(folder, setting),
        "core_seconds": _cost(cell, folder, samples, setting),
    }


def make_samples(setting: Setting) -> dict[str, Any]:
    """How many answers the teacher was asked for, how many were kept, and the core seconds; made once. Raises
    ValueError where there are fewer than a run needs."""
    told = setting.samples / "made.json"
    if not told.is_file():
        setting.samples.mkdir(parents=True, exist_ok=True)
        rows = [f"data.train.{i}.rows={count}" for i, count in enumerate(shares(setting.sampled))]
        of_all = [each for each in setting.overrides() if not each.startswith("data.train.")]
        asked = {"config": str(CONFIG), "overrides": [f"run.dir={setting.samples}", *of_all, *rows]}
        write_whole(setting.samples / "sample.json", json.dumps(asked))
        command = [sys.executable, str(Path(__file__).with_name("sample.py")), str(setting.samples)]
        before, how = core_seconds(), {"folder": str(ROOT), "timeout_s": setting.timeout_s}
        found = tool.told_by("sampling by the teacher", command, environment=environment(setting.threads), **how)
        write_whole(told, json.dumps({**found, "core_seconds": round(core_seconds() - before, 1)}))
    made: dict[str, Any] = json.loads(told.read_text())
    needed = setting.steps * setting.prompts
    if sum(made["kept"].values()) < needed:
        raise ValueError(f"a run needs {needed} prompts, and {made['kept']} of the samples are kept: raise --sampled")
    return made


def trained_steps(cell: Cell, setting: Setting) -> int:
    """Steps that the cell's run has behind it."""
    return max((int(row["step"]) for row in _rows(setting.place(cell))), default=0)


def points(folder: Path, setting: Setting) -> list[dict[str, float]]:
    """The measures of each evaluation, and the tokens that had a gradient until then."""
    found: dict[int, dict[str, float]] = {}
    tokens = 0.0
    for row in _rows(folder):
        length = row.get("answers/length_others", row.get("rollout/length", 0.0))  # one of the two: all answer alike
        tokens += setting.prompts * length * (1 - row.get("step/skipped", 0.0))
        if _MEASURES["kl"] in row:
            measures = {name: row[metric] for name, metric in _MEASURES.items()}
            found[int(row["step"])] = {"step": row["step"], "tokens": round(tokens), **measures}
    return [found[step] for step in sorted(found)]


def _rows(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    return read_metrics(path) if path.is_file() else []


def _cost(cell: Cell, folder: Path, samples: dict[str, Any], setting: Setting) -> dict[str, float]:
    """Core seconds: of the whole cell, and of the training in it, by its share of the time; and of the teacher's
    samples that the cell used, in all that were sampled."""
    attempts = [json.loads(text) for text in (folder / _ATTEMPTS).read_text().splitlines()]
    spent, seconds = (sum(one[name] for one in attempts) for name in ("core_seconds", "seconds"))
    in_training = sum(row.get(f"time/{stage}", 0.0) for row in _rows(folder) for stage in _STAGES)
    share = setting.steps * setting.prompts / sum(samples["kept"].values()) if cell.method.learns_samples else 0.0
    return {
        "cell": round(spent, 1),
        "training": round(spent * in_training / seconds, 1),
        "samples": round(samples["core_seconds"] * min(1.0, share), 1),
    }


class _Attempt:
    """Notes what a process took, also where it was interrupted."""

    def __init__(self, path: Path) -> None:
        self.path, self.spent, self.started = path, core_seconds(), time.monotonic()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        took = {"core_seconds": core_seconds() - self.spent, "seconds": time.monotonic() - self.started}
        with self.path.open("a") as file:
            file.write(json.dumps(took) + "\n")


def _pass_on(origin: Path, copy: Path) -> None:
    """The teacher's answers to held-out prompts: they are the same for all cells, and the trainer looks if they fit."""
    if origin.is_file() and not copy.is_file():
        write_whole(copy, origin.read_text())
