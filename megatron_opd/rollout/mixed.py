"""Answers that student and teacher sample together, token by token: MiniLLM's teacher-mixed sampling.

    p~(y) = (1 - alpha) q(y) + alpha p(y)

(Gu et al. 2024, arXiv:2306.08543, equation 5.) Both distributions are tempered alike, and the log-probabilities of the
rollout are those of p~, so that importance weights q/p~ of them are right.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_opd.core.types import Prompt, Rollout, Sampling
from megatron_opd.rollout.embedded_engine import LocalEngine, rollouts
from megatron_opd.rollout.reading import MixtureReader


class MixedEngine:
    """Samples from the mixture of two embedded engines, whose models and weights stay theirs."""

    def __init__(self, student: LocalEngine, teacher: LocalEngine, *, alpha: float) -> None:
        self.student, self.teacher, self.alpha = student, teacher, alpha

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, on_finished: Callable[[Rollout], None] | None = None
    ) -> list[Rollout]:
        """All samples of all prompts, prompt-major, as the student's engine has them; versions are the student's."""
        readers = self.student.reader(), self.teacher.reader()
        mixture = MixtureReader(*readers, alpha=self.alpha, temperature=sampling.temperature)
        own = {"eos_ids": self.student.eos_ids, "version": self.student.version}
        return rollouts(mixture, prompts, sampling, **own, told=on_finished)
