"""The answers to a step's prompts, in the prompts' order: from the student, a teacher, both mixed, or the data set.

Who answers follows from settings, seed and step alone, so it is the same on every rank and layout, and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from megatron_opd.config import AnswersConfig, TeacherConfig
from megatron_opd.core.episodes import episodes
from megatron_opd.core.protocols import OnFinished, RolloutEngine
from megatron_opd.core.types import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from megatron_opd.rollout.mixed import MixedEngine

_Ask = Callable[[list[Prompt], Sampling, OnFinished], list[Rollout]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Decides who answers a prompt."""

    answers: AnswersConfig
    teachers: Sequence[TeacherConfig]
    seed: int
    """`run.seed`."""

    def is_for_student(self, prompt: Prompt, step: int) -> bool:
        """Whether the student answers the prompt in this step, which it does with probability `answers.lmbda` (Agarwal
        et al. 2024, arXiv:2306.13649, algorithm 1, where one number decides for a batch)."""
        text = f"answers/{self.seed}/{step}/{prompt.source}/{prompt.index}"
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")
        return number < self.answers.lmbda * 2**48

    def teacher(self, source: str) -> TeacherConfig:
        """The teacher that samples answers to prompts of a source: the one named in `answers.teacher`, or else the one
        with the largest weight for the source."""
        if self.answers.teacher:
            return next(t for t in self.teachers if t.name == self.answers.teacher)
        return max(self.teachers, key=lambda t: t.weight_for(source))


class Answers:
    """Asks who is to answer. A prompt has as many answers as `Sampling` says from any of them, so that all replicas
    have equally many; an answer of the data set is then there that many times."""

    def __init__(
        self,
        choice: Choice,
        engine: RolloutEngine,
        teachers: Mapping[str, RolloutEngine],
        mixed: Mapping[str, MixedEngine],
        *,
        eos_ids: tuple[int, ...],
    ) -> None:
        """`teachers` sample alone, `mixed` with the student; both by the teacher's name."""
        self.choice, self.engine, self.teachers, self.mixed = choice, engine, teachers, mixed
        self.eos_ids = eos_ids

    def to(self, prompts: list[Prompt], sampling: Sampling, step: int, on_finished: OnFinished) -> list[Rollout]:
        """`sampling.samples_per_prompt` answers to each prompt, prompt-major. `on_finished` is told of each as soon as
        it is there."""
        groups: dict[tuple[str, str], list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(self._who(prompt, step), []).append(i)
        answers: dict[int, list[Rollout]] = {}
        count = sampling.samples_per_prompt
        for who, indices in groups.items():
            found = self._ask(who)([prompts[i] for i in indices], sampling, on_finished)
            its = [[found[j] for j in episode] for episode in episodes(found)]
            for at, i in enumerate(indices):
                answers[i] = [rollout for episode in its[at * count : (at + 1) * count] for rollout in episode]
        return [rollout for i in range(len(prompts)) for rollout in answers[i]]

    def metrics(self) -> dict[str, float]:
        """What the teachers' servers counted since the last call, as `answers/…`."""
        counted = [teacher.metrics() for teacher in self.teachers.values()]
        names = dict.fromkeys(name for one in counted for name in one)
        return {
            f"answers/{name.removeprefix('rollout/')}": sum(one.get(name, 0.0) for one in counted) for name in names
        }

    def close(self) -> None:
        """End what runs for the teachers that sample."""
        for teacher in self.teachers.values():
            teacher.close()

    def _who(self, prompt: Prompt, step: int) -> tuple[str, str]:
        """(kind of answer, name of the teacher that takes part in it)."""
        if self.choice.is_for_student(prompt, step):
            return ("mixed", self._teacher(prompt)) if self.mixed else ("student", "")
        return ("teacher", self._teacher(prompt)) if self.choice.answers.seq_kd else ("dataset", "")

    def _teacher(self, prompt: Prompt) -> str:
        return self.choice.teacher(prompt.source).name

    def _ask(self, who: tuple[str, str]) -> _Ask:
        kind, name = who
        if kind == "student":
            return self.engine.generate
        if kind == "mixed":
            return self.mixed[name].generate
        return partial(self._ask_teacher, name) if kind == "teacher" else self._look_up

    def _ask_teacher(
        self, name: str, prompts: list[Prompt], sampling: Sampling, on_finished: OnFinished
    ) -> list[Rollout]:
        """Answers that the teacher samples, to the prompts as it sees them."""
        own = {(prompt.source, prompt.index, prompt.repeat): prompt for prompt in prompts}

        def as_ours(rollout: Rollout) -> Rollout:
            prompt = own[rollout.prompt.source, rollout.prompt.index, rollout.prompt.repeat]
            return replace(rollout, prompt=prompt, origin="teacher", versions=(0,) * rollout.num_learnt)

        seen = [prompt.seen_by(name) for prompt in prompts]
        found = self.teachers[name].generate(seen, sampling, lambda rollout: on_finished(as_ours(rollout)))
        return [as_ours(rollout) for rollout in found]

    def _look_up(self, prompts: list[Prompt], sampling: Sampling, on_finished: OnFinished) -> list[Rollout]:
        """Answers of the data set."""
        found = [self._of_row(prompt, sample) for prompt in prompts for sample in range(sampling.samples_per_prompt)]
        for rollout in found:
            on_finished(rollout)
        return found

    def _of_row(self, prompt: Prompt, sample: int) -> Rollout:
        ids = prompt.answer_ids
        return Rollout(
            prompt=prompt,
            sample=sample,
            token_ids=ids,
            learnt=(True,) * len(ids),
            logps=(0.0,) * len(ids),
            finish="stop" if ids[-1] in self.eos_ids else "length",
            versions=(0,) * len(ids),
            origin="dataset",
        )
