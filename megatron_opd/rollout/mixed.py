"""Answers that student and teacher sample together, token by token: MiniLLM's teacher-mixed sampling.

    p~(y) = (1 - alpha) q(y) + alpha p(y)

(Gu et al. 2024, arXiv:2306.08543, equation 5.) Both distributions are tempered alike, and the log-probabilities of the
rollout are those of p~, so that importance weights q/p~ of them are right.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_opd.rollout.embedded_engine import LocalEngine


class MixedEngine(LocalEngine):
    """Samples from the mixture of two embedded engines, whose models and weights stay theirs."""

    def __init__(self, student: LocalEngine, teacher: LocalEngine, *, alpha: float) -> None:
        self.student, self.teacher = student, teacher
        self.log_weights = math.log1p(-alpha), math.log(alpha)
        self.model, self.eos_ids, self.vocab_size = student.model, student.eos_ids, student.vocab_size
        self.has_weights = True

    @property
    def version(self) -> int:  # type: ignore[override]
        """The student's."""
        return self.student.version

    def _logits(self, ids_BS: torch.Tensor, cache: Any, temperature: float) -> tuple[torch.Tensor, Any]:
        """Such that the softmax of logits / temperature is the mixture; the caches are a pair."""
        pair = []
        for engine, own in zip((self.student, self.teacher), cache or (None, None), strict=True):
            logits_BV, own = engine._logits(ids_BS, own, temperature)
            pair.append((torch.log_softmax(logits_BV / (temperature or 1.0), dim=-1), own))
        (student_BV, students), (teacher_BV, teachers) = pair
        of_student, of_teacher = self.log_weights
        mixed_BV = torch.logaddexp(student_BV + of_student, teacher_BV + of_teacher)
        return mixed_BV * (temperature or 1.0), (students, teachers)
