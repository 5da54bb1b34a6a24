"""Training and measuring the model of a cell, each in a process of its own."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tool
from comparison import training
from comparison.lines import digest, told
from comparison.training import ROOT
from teacher_comparison.cells import SOURCES, Cell

from megatron_opd.core.run_dir import CHECKPOINTS, HF_EXPORT
from megatron_opd.core.whole_file import write_whole

_CONFIG = ROOT / "examples/llm/two_teachers.yaml"
_SPECIALIST = ROOT / "examples/llm/specialist.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Settings that all cells share."""

    folder: Path
    model: Path
    """The original."""
    student: Path
    """The student before."""
    steps: int
    prompts: int
    held_out: int
    """Prompts of each source that are evaluated."""
    specialist_steps: int
    threads: int
    timeout_s: int

    def told(self) -> dict[str, Any]:
        """The settings that decide a cell's numbers."""
        names = ("model", "student", "steps", "prompts", "held_out", "specialist_steps")
        return {name: told(getattr(self, name)) for name in names}

    def place(self, name: str, *settings: str) -> Path:
        """The directory of a run, another one for other values of the `settings` that decide its model. So a run that
        was cut off goes on, and none is taken for another."""
        return self.folder / f"{name}-{digest([told(getattr(self, setting)) for setting in settings])}"

    @property
    def specialist_run(self) -> Path:
        """Directory of the run that makes the specialist."""
        return self.place("specialist", "model", "specialist_steps")

    @property
    def specialist(self) -> Path:
        """Model directory of the specialist."""
        return self.specialist_run / HF_EXPORT


def finished(cell: Cell, setting: Setting) -> dict[str, Any]:
    """The cell's line, after training its model and measuring it. Raises ValueError when a run fails."""
    before = training.core_seconds()
    model = {"before": setting.student, "original": setting.model, "specialist": setting.specialist}.get(cell.name)
    if model is None:
        model = _trained(cell, setting)
    spent = training.core_seconds() - before
    metrics = _measured(cell, model, setting)
    return {
        "cell": cell.name,
        "settings": setting.told(),
        "overrides": list(cell.settings or ()),
        "core_seconds": {"train": round(spent, 1), "measure": round(training.core_seconds() - before - spent, 1)},
        "metrics": metrics,
    }


def make_specialist(setting: Setting) -> None:
    """Train the specialist, unless it is there."""
    if not (setting.specialist / "config.json").is_file():
        steps = [
            f"train.steps={setting.specialist_steps}",
            f"optim.warmup_steps={min(3, setting.specialist_steps - 1)}",
        ]
        _train(_SPECIALIST, setting.specialist_run, [f"student.model={setting.model}", *steps], setting)


def _trained(cell: Cell, setting: Setting) -> Path:
    """The export of its run."""
    folder = setting.place(cell.name, "model", "student", "steps", "prompts", "specialist_steps")
    steps = [f"train.steps={setting.steps}", f"optim.warmup_steps={min(2, setting.steps - 1)}"]
    more = [*steps, f"rollout.prompts_per_step={setting.prompts}", "train.eval_every=0", *(cell.settings or ())]
    if not (folder / HF_EXPORT / "config.json").is_file():
        _train(_CONFIG, folder, [f"student.model={setting.student}", *_teachers(setting), *more], setting)
    return folder / HF_EXPORT


def _teachers(setting: Setting) -> list[str]:
    return [f"teachers.0.model={setting.model}", f"teachers.1.model={setting.specialist}"]


def _train(config: Path, folder: Path, overrides: list[str], setting: Setting) -> None:
    training.train(config, folder, overrides, threads=setting.threads, timeout_s=setting.timeout_s)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # 2 GB; the export stays


def _measured(cell: Cell, model: Path, setting: Setting) -> dict[str, Any]:
    """By source and metric."""
    folder = setting.folder / "measured" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = [f"data.eval.{i}.rows={setting.held_out}" for i in range(len(SOURCES))]
    overrides = [f"student.model={model}", f"run.dir={folder}", *_teachers(setting), *rows]
    asked = {"config": str(_CONFIG), "overrides": overrides, "answers": str(setting.folder / "answers")}
    write_whole(folder / "measure.json", json.dumps(asked))
    command = [sys.executable, str(Path(__file__).with_name("measured.py")), str(folder)]
    how: dict[str, Any] = {"folder": str(ROOT), "timeout_s": setting.timeout_s}
    return tool.told_by(f"measuring {cell.name}", command, environment=training.environment(setting.threads), **how)
