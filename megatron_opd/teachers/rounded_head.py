"""A teacher whose output head computes in FP8, emulated: hidden states and rows as FP8 knows them.

A product of rounded operands is the product that FP8 makes, so the loss need not know. In FP8 proper
(`precision/scaled.py`) the hidden states of a chunk share a scale; here those of all answers scored together do.
"""

from __future__ import annotations

import torch

from megatron_opd.core.scores import Hidden, TeacherScore
from megatron_opd.core.types import Rollout
from megatron_opd.precision.fp8_plan import Products
from megatron_opd.precision.quantize import Rounding
from megatron_opd.teachers.offload import OffloadedWeights
from megatron_opd.teachers.scorer import TeacherScorer


class RoundedHead:
    """A TeacherScorer around another one that tells hidden states."""

    def __init__(self, inner: TeacherScorer, products: Products) -> None:
        self.inner, self.name, self.foreigner = inner, inner.name, inner.foreigner
        self._hidden = Rounding(products.recipe.activations)
        head_LD = inner.head_LD
        self.head_LD = None if head_LD is None else Rounding(products.recipe.weights)(head_LD)

    @property
    def offloaded(self) -> OffloadedWeights | None:
        """The other one's."""
        return self.inner.offloaded

    def submit(self, rollout: Rollout) -> None:
        """As the other one does."""
        self.inner.submit(rollout)

    def score(self, rollouts: list[Rollout]) -> list[TeacherScore | None]:
        """As the other one does, with rounded hidden states."""
        scores = self.inner.score(rollouts)
        told = [s.hidden_RD for s in scores if isinstance(s, Hidden) and s.hidden_RD is not None]
        if not told:
            return scores
        # All rows together, as one product has them: that is what a scale of a whole tensor is about.
        rows = iter(self._hidden(torch.cat(told)).split([len(rows_RD) for rows_RD in told]))
        return [Hidden(next(rows)) if isinstance(s, Hidden) and s.hidden_RD is not None else s for s in scores]

    def metrics(self) -> dict[str, float]:
        """The other one's."""
        return self.inner.metrics()

    def close(self) -> None:
        """Ends the other one."""
        self.inner.close()
