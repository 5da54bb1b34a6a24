"""Settings that all cells share, and the directories that follow from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from comparison.lines import digest, told
from comparison.training import ROOT
from llm_cells.cells import Cell

from megatron_opd.config.file import read

CONFIG = ROOT / "examples/llm/quickstart.yaml"
_NOT_DECIDING = {"run", "model", "log", "save_every", "save_best", "keep_last", "export"}
"""Names in the config whose values do not decide a number, or are told otherwise."""
_SOURCES = ("gsm8k", "instructions")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Settings that all cells share."""

    folder: Path
    """Directory of the runs."""
    model: Path
    """The teacher."""
    student: Path
    """The student before."""
    steps: int
    prompts: int
    """Prompts a step, with one answer each."""
    tokens: int
    """Longest answer."""
    minibatches: int
    evaluations: int
    """After the first one, at equal distances."""
    held_out: int
    """Prompts that are evaluated; two thirds are problems, the others instructions."""
    sampled: int
    """Prompts that the teacher answers, in the same shares."""
    threads: int
    timeout_s: int

    @property
    def eval_every(self) -> int:
        """Steps between evaluations."""
        return self.steps // self.evaluations

    def told(self) -> dict[str, Any]:
        """The settings that decide a cell's numbers. Models that are not there are left out."""
        not_deciding = ("folder", "threads", "timeout_s")
        names = [field.name for field in dataclasses.fields(self) if field.name not in not_deciding]
        found = {name: told(getattr(self, name)) for name in names}
        return {**{name: value for name, value in found.items() if value != ""}, "recipe": digest(self._recipe())}

    def place(self, cell: Cell) -> Path:
        """Directory of the cell's run: other settings have another one, so no run is taken for another."""
        name = cell.name.replace("/", "-")
        return self.folder / f"{name}-{digest([self.told(), cell.method.settings])}"

    @property
    def samples(self) -> Path:
        """Directory of the teacher's samples."""
        follows_from = [told(self.model), self.tokens, self.sampled, {**self._recipe()["data"], "eval": []}]
        return self.folder / f"samples-{digest(follows_from)}"

    def overrides(self) -> list[str]:
        """Settings that all cells have alike."""
        samples = [f"data.train.{i}.path={self.samples / name}.jsonl" for i, name in enumerate(_SOURCES)]
        return [f"student.model={self.student}", f"teachers.0.model={self.model}", *samples, *self._sizes()]

    def _sizes(self) -> list[str]:
        problems, instructions = shares(self.held_out)
        return [
            f"data.eval.0.rows={problems}",
            f"data.eval.1.rows={instructions}",
            f"rollout.prompts_per_step={self.prompts}",
            f"rollout.max_new_tokens={self.tokens}",
            f"train.steps={self.steps}",
            f"train.minibatches={self.minibatches}",
            f"train.eval_every={self.eval_every}",
            f"train.save_every={self.eval_every}",
            *_FIXED,
        ]

    def _recipe(self) -> dict[str, Any]:
        """All else that decides the numbers: everything that the config says, with files as what is in them."""
        found: dict[str, Any] = _contents(read(CONFIG, [*self._sizes(), *of_lr(0.0)]))
        return found


_FIXED = (
    "data.max_prompt_tokens=128",
    "answers.on_too_long=cut",
    "optim.warmup_steps=2",
    "train.micro_batch_size=4",
    "train.keep_last=1",
    "train.export=false",
    "log.answer_every=0",
)
"""Further settings of all cells."""


def shares(count: int) -> tuple[int, int]:
    """(problems, instructions) of so many prompts."""
    return count - count // 3, count // 3


def of_lr(lr: float) -> list[str]:
    """It falls to a tenth."""
    return [f"optim.lr={lr:g}", f"optim.min_lr={lr / 10:g}"]


def _contents(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {name: its for name, its in value.items() if name not in _NOT_DECIDING}
        return {name: _of_file(its) if name == "path" else _contents(its) for name, its in kept.items()}
    return [_contents(one) for one in value] if isinstance(value, list) else value


def _of_file(path: str) -> str:
    return blake2b((ROOT / path).read_bytes(), digest_size=8).hexdigest()
