"""The loss of a run: the sum of its terms at the response tokens of a micro-batch.

    loss = Σ_tokens   w D(teachers, student)       `distillation.py`, always
                    - A log q(y), by ratios        `policy_gradient.py`, with `policy`
                    - v log q(y)                   `sampled_tokens.py`, with `has_cross_entropy`

Each term makes its gradient with respect to the logits in the forward pass; adding them up is autograd's work. The
weights w and v and the advantages A travel in the micro-batch, shares of means included (`trainer/shaping.py`). Masking
is done by the micro-batch, which lists response tokens only; Megatron divides the sum by the global number of tokens.
Where distillation is the only term, it is all that happens.

Shape suffixes: T response tokens of a micro-batch, L local vocabulary columns, M metrics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_opd.config import PolicyConfig
from megatron_opd.core.types import MicroBatch
from megatron_opd.loss.crosstok.distillation_in_bytes import CrossTokenizer
from megatron_opd.loss.distillation import Distillation
from megatron_opd.loss.fused import Logits
from megatron_opd.loss.sampled_tokens import SampledTokens
from megatron_opd.loss.term import Term, sums


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss of a run on this rank's shard of the vocabulary."""

    distillation: Distillation | CrossTokenizer
    """Its settings of the loss, sampling temperature and vocabulary are those of the other terms too."""
    policy: PolicyConfig | None = None
    """Settings of the policy gradient; None: advantages are not looked at."""
    has_answers_of_others: bool = False
    """Whether there may be tokens that the student did not sample."""
    has_cross_entropy: bool = False
    """Whether there is a cross-entropy of such tokens; otherwise its weights are not looked at."""

    def metric_names(self) -> list[str]:
        """Names of the per-token sums that a call returns, in order."""
        names = self.distillation.metric_names()
        sampled = self._sampled()
        if sampled is None:
            return names
        split = ["loss/on_policy", "loss/off_policy"] if self.has_answers_of_others else []
        return [*names, *sampled.metric_names()[1:], "loss/distill", *split]

    @property
    def takes_hidden(self) -> bool:
        """Whether a call may be given the student's hidden states and head in place of its logits."""
        return self._sampled() is None and self.distillation.takes_hidden

    def __call__(self, batch: MicroBatch, student: Logits) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum of the loss over tokens, number of tokens as int32, metrics [M, 2] float64).

        `student` are the student's logits at `batch.predicted_at_T`, or their factors; with gradients on,
        logits may be overwritten. The metrics are the sum over tokens, and the number of tokens summed, of each of
        `metric_names`.
        """
        term = self._total(batch, student)
        return term.loss, torch.tensor(len(term.loss_T), dtype=torch.int, device=term.loss.device), term.metrics_M2

    @torch.no_grad()
    def by_token(self, batch: MicroBatch, student: Logits) -> torch.Tensor:
        """The loss of every token [T], without a gradient."""
        return self._total(batch, student).loss_T

    def _total(self, batch: MicroBatch, student: Logits) -> Term:
        sampled = self._sampled()
        if sampled is None:
            return self.distillation(batch, student)
        assert isinstance(student, torch.Tensor), "the terms of sampled tokens need logits"
        others = sampled(batch, student)  # first: the fused loss leaves its gradient in the logits' place
        weight = self.distillation.config.weight
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            distill = self.distillation(batch, student)
        if weight == 0:
            distill = Term(torch.zeros_like(distill.loss), torch.zeros_like(distill.loss_T), distill.metrics_M2)
        loss_T = distill.loss_T + others.loss_T
        columns = [loss_T, distill.loss_T, *(self._split(batch, loss_T))]
        made_M2 = sums(columns)
        metrics_M2 = torch.cat([made_M2[:1], distill.metrics_M2[1:], others.metrics_M2[1:], made_M2[1:]])
        return Term(others.loss + distill.loss, loss_T, metrics_M2)

    def _split(self, batch: MicroBatch, loss_T: torch.Tensor) -> list[torch.Tensor]:
        """The loss at the student's own tokens and at those of others."""
        if not self.has_answers_of_others:
            return []
        return [loss_T[batch.on_policy_T], loss_T[~batch.on_policy_T]]

    def _sampled(self) -> SampledTokens | None:
        if self.policy is None and not self.has_answers_of_others:
            return None
        base = self.distillation
        terms = self.policy, self.has_cross_entropy
        return SampledTokens(*terms, base.sampling_temperature, base.vocab, base.config.chunk_tokens)
