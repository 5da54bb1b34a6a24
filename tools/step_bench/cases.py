"""What is to be measured: a config, a layout, a number of teachers, and how often."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
from dataclasses import dataclass
from typing import Any

from megatron_opd.config import Config, ParallelConfig
from megatron_opd.config.checks import check
from megatron_opd.config.file import ConfigError, load

_SIZES = ("tensor", "pipeline", "data", "context")
"""Of a layout, in the order in which it is written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One line of the table."""

    path: str
    overrides: list[str]
    tensor: int
    pipeline: int
    data: int
    context: int
    teachers: int
    weak: bool
    warmup: int
    steps: int
    repeats: int
    gpu: str
    folder: str = "runs/bench"
    """Where the run lives."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def layout(self) -> str:
        """As `--layouts` takes it."""
        layout = f"{self.tensor}x{self.pipeline}x{self.data}"
        return layout if self.context == 1 else f"{layout}x{self.context}"

    @property
    def name(self) -> str:
        """What `--compare` knows it by."""
        config = self.config()
        carriers = "+".join(sorted({t.carrier for t in config.teachers}))
        ahead = f", {config.rollout.max_staleness} ahead" if config.rollout.max_staleness else ""
        return f"{self.layout}, {self.teachers} {carriers}{ahead}{', weak' if self.weak else ''}"

    @property
    def total_steps(self) -> int:
        """With the one whose collectives are counted."""
        return self.warmup + 1 + self.steps * self.repeats

    def at(self, folder: str) -> Case:
        """The same, living elsewhere."""
        return dataclasses.replace(self, folder=folder)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def config(self) -> Config:
        """The config of this case. Raises ConfigError for one that is not possible."""
        base = load(self.path, self.overrides)
        old = base.parallel
        sequence = self.tensor > 1 and (old.sequence or old.expert > 1)
        expert = self.tensor if old.expert > 1 else 1
        sizes = {name: getattr(self, name) for name in _SIZES}
        prompts = base.rollout.prompts_per_step * (self.data if self.weak else 1)
        made = dataclasses.replace(
            base,
            run=dataclasses.replace(base.run, dir=self.folder),
            parallel=ParallelConfig(**sizes, expert=expert, sequence=sequence),
            teachers=_teachers(base, self.teachers),
            rollout=dataclasses.replace(base.rollout, prompts_per_step=prompts),
            optim=dataclasses.replace(base.optim, warmup_steps=0),
            train=dataclasses.replace(base.train, steps=self.total_steps, eval_every=0, save_every=0, export=False),
        )
        problems = check(made)
        if problems:
            raise ConfigError(problems, where=f"{self.path}, {self.layout}")
        return made


def _teachers(base: Config, count: int) -> list[Any]:
    """The config's teachers, the first of them again where there are more asked for."""
    names = [f"{t.name}_{i}" if i >= len(base.teachers) else t.name for i, t in _cycle(base, count)]
    again = [t for _, t in _cycle(base, count)]
    return [dataclasses.replace(t, name=name) for t, name in zip(again, names, strict=True)]


def _cycle(base: Config, count: int) -> list[tuple[int, Any]]:
    return list(itertools.islice(enumerate(itertools.cycle(base.teachers)), count))


def of(arguments: argparse.Namespace) -> list[Case]:
    """Every combination of layouts and numbers of teachers. Raises ValueError for what is none."""
    base = load(arguments.config, arguments.overrides)
    own = base.parallel
    layouts = [_sizes(text) for text in arguments.layouts] or [{name: getattr(own, name) for name in _SIZES}]
    made = [
        Case(
            path=arguments.config,
            overrides=arguments.overrides,
            **sizes,
            teachers=teachers,
            weak=arguments.scaling == "weak",
            warmup=arguments.warmup,
            steps=arguments.steps,
            repeats=arguments.repeats,
            gpu=arguments.gpu,
            folder=f"{base.run.dir}/bench",  # not the run's own: its checkpoints are of a run, and would be continued
        )
        for teachers in arguments.teachers or [len(base.teachers)]
        for sizes in layouts
    ]
    for case in made:
        case.config()
    return made


def _sizes(text: str) -> dict[str, int]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2,3}", text):
        raise ValueError(
            f"--layouts {text}: a layout is TENSORxPIPELINExDATA, for example 2x1x4, or with xCONTEXT behind it"
        )
    return {"context": 1, **dict(zip(_SIZES, map(int, text.split("x")), strict=False))}
