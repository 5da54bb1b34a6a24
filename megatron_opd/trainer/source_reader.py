"""Reading the prompt sources of a config: their problems, notes, fingerprints and longest prompts."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from megatron_opd.config import Config, SourceConfig
from megatron_opd.config.environment import OF_THE_RUN
from megatron_opd.core.types import Prompt
from megatron_opd.prompts.chat import Encoder
from megatron_opd.prompts.fingerprint import Fingerprint
from megatron_opd.prompts.mix import Limit, read_prompts
from megatron_opd.prompts.store import PackedPrompts
from megatron_opd.prompts.views import RowReader, build_row_reader, build_views
from megatron_opd.rewards import build_reward
from megatron_opd.rewards.base import Reward
from megatron_opd.sglang import serve
from megatron_opd.trainer.reward_trial import problems_of_rows
from megatron_opd.trainer.source_worlds import SourceWorld, SourceWorlds

_T = TypeVar("_T")


@contextmanager
def collecting(what: str, problems: list[str]) -> Iterator[None]:
    """A block whose ValueError becomes one of the problems, with the name of the setting before it."""
    try:
        yield
    except ValueError as error:
        problems.append(f"{what}: {error}")


def attempt(what: str, compute: Callable[[], _T], problems: list[str]) -> _T | None:
    """The result, or None where it raises ValueError, which becomes one of the problems."""
    with collecting(what, problems):
        return compute()
    return None


@dataclass(frozen=True, slots=True)
class SourceReader:
    """Reads sources one after the other, and collects what is found out on the way."""

    config: Config
    worlds: SourceWorlds
    context: int
    """Positions of the model that has the fewest."""
    problems: list[str]
    rows_to_try: int
    notes: list[str] = field(default_factory=list)
    longest: list[int] = field(default_factory=list)
    """Tokens of each source's longest prompt."""
    fingerprints: dict[str, list[Fingerprint]] = field(default_factory=lambda: defaultdict(list))
    """By data.train and data.eval, of the sources that could be read."""
    rewards: dict[str, Reward | None] = field(default_factory=dict)
    """By name; None for one that cannot be built, which is reported already."""

    def sources(
        self, setting: str, sources: list[SourceConfig], *, are_graded: bool
    ) -> list[tuple[SourceConfig, Sequence[Prompt]]]:
        """The prompts of the sources under a setting, `data.train` or `data.eval`."""
        if self._room() < 1:
            problem = (
                f"rollout.max_new_tokens ({self.config.rollout.max_new_tokens}) leaves no room for a prompt in the"
                f" models' context of {self.context} tokens"
            )
            if problem not in self.problems:
                self.problems.append(problem)
            return []
        found: list[tuple[SourceConfig, Sequence[Prompt]]] = []
        for i, source in enumerate(sources):
            reward, world = self._reward(source.reward), self._world(f"{setting}.{i}", source)
            if reward is None or world is None:
                continue
            within = self._limit(source)
            read = functools.partial(read_prompts, source, world.encoder, limit=within, reward=reward, kind=world.kind)
            rows = functools.partial(self._rows, source, within, world.encoder, is_trained_on=setting == "data.train")
            prompts = None
            with collecting("data", self.problems):
                prompts = read(is_graded=are_graded and (reward.grades or setting == "data.train"), complete=rows())
            found.append((source, prompts or []))
            if prompts and prompts.fingerprint:
                self.fingerprints[setting].append(prompts.fingerprint)
            if prompts:
                self.longest.append(prompts.longest)
            if prompts and are_graded and reward.grades:
                self._try(source, prompts, reward)
            if prompts and prompts.dropped:
                self.notes.append(_dropped(f"{setting}: {source.name}", prompts, within))
        return found

    @property
    def _positions(self) -> int:
        """Tokens of the longest sequence that every model has room for. A server keeps some positions for itself."""
        return self.context - (serve.MARGIN if self.config.is_served else 0)

    def _room(self) -> int:
        """Tokens of a prompt that leave room for an answer in every model."""
        return self._positions - self.config.rollout.max_new_tokens

    def _limit(self, source: SourceConfig) -> Limit:
        """The limit of a source's prompts, and of those that teachers see instead."""
        config, environment = self.config, self.config.environment_of(source)
        limit, why = config.data.max_prompt_tokens, "data.max_prompt_tokens"
        if self._room() < limit:
            limit, why = self._room(), f"the models' context of {self.context} tokens less rollout.max_new_tokens"
        if environment.is_on:
            left = environment.max_tokens - config.rollout.max_new_tokens
            if left < limit:
                limit, why = left, f"environment.max_tokens of {environment.max_tokens} less rollout.max_new_tokens"
            asked = [teacher for teacher in config.teachers if teacher.weight_for(source.name) > 0]
            # Behind a teacher's prompt there may be all that a trajectory has behind a prompt of one token.
            left = self._positions - environment.max_tokens + 1
            if left < limit and any(teacher.has_own_prompt for teacher in asked):
                what = f"the models' context of {self.context} tokens less environment.max_tokens"
                limit, why = left, f"{what}, as a teacher sees prompts of its own; lower environment.max_tokens"
        return Limit(max(limit, 0), why, drop=config.data.on_too_long == "drop")

    def _world(self, setting: str, source: SourceConfig) -> SourceWorld | None:
        """The source's environment; None for one that cannot be had, which is reported then, once."""
        settings, problems = self.config.environment_of(source), list[str]()
        of_run = source.environment.name == OF_THE_RUN
        what = "environment" if of_run else f"{setting}.environment"
        world = attempt(what, lambda: self.worlds.of(settings), problems)
        self.problems.extend(problem for problem in problems if problem not in self.problems)
        if settings.is_on and settings.max_tokens > self._positions:
            note = (
                f"{what}.max_tokens ({settings.max_tokens}) is more than the {self._positions} tokens that the models"
                " have room for: episodes end there"
            )
            self.notes.extend([note] if note not in self.notes else [])
        return world

    def _rows(self, source: SourceConfig, limit: Limit, encoder: Encoder, *, is_trained_on: bool) -> RowReader | None:
        config = self.config
        return build_row_reader(
            build_views(config.teachers, config.data, source, encoder),
            encoder,
            limit=limit,
            answers=config.answers,
            max_answer_tokens=config.rollout.max_new_tokens,
            is_trained_on=is_trained_on,
            is_measured=config.train.eval_nll and not is_trained_on,
        )

    def _try(self, source: SourceConfig, prompts: Sequence[Prompt], reward: Reward) -> None:
        """Report the rows whose tests cannot tell right answers from wrong ones."""
        if reward.trial is None or not self.rows_to_try:
            return
        workers = self.config.rewards.code_workers
        wrong, note = problems_of_rows(source, prompts, reward.trial, most=self.rows_to_try, workers=workers)
        self.problems.extend(f"data: {problem}" for problem in wrong)
        self.notes.extend([note] if note else [])

    def _reward(self, name: str) -> Reward | None:
        if name not in self.rewards:
            self.rewards[name] = attempt(
                f"reward {name}", lambda: build_reward(name, self.config.rewards), self.problems
            )
        return self.rewards[name]


def _dropped(what: str, prompts: PackedPrompts, limit: Limit) -> str:
    """A line about the prompts that were left out of a source; a warning when they are more than a tenth."""
    total = len(prompts) + prompts.dropped
    line = f"{what}: left out {prompts.dropped} of {total} prompts, longer than {limit.tokens} tokens ({limit.why})"
    return f"warning: {line}" if prompts.dropped > total / 10 else line
