"""The loss of a run: the sum of its terms at the learnt tokens of a micro-batch.

    loss = Σ_tokens   w D(teachers, student)       `distillation`, always
                    + terms of `sampled`           policy gradient, cross-entropy: `sampled_tokens.py`

The distillation and the sampled terms together each make their gradient with respect to the logits in the forward pass;
adding the two up is autograd's work. Weights travel in the micro-batch, shares of means included
(`trainer/shaping.py`). Masking is done by the micro-batch, which lists learnt tokens only; Megatron divides the sum by
the global number of tokens. Where distillation is the only term, it is all that happens.

Shape suffixes: T learnt tokens of a micro-batch, L local vocabulary columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_opd.core.types import MicroBatch
from megatron_opd.loss import agreement
from megatron_opd.loss.fused import Logits
from megatron_opd.loss.metrics import Columns, Sums, sums
from megatron_opd.loss.sampled_tokens import sampled_tokens
from megatron_opd.loss.term import TeacherTerm, TermResult, TokenTerm
from megatron_opd.tracking.headline import Headline


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss of a run on this rank's shard of the vocabulary."""

    distillation: TeacherTerm
    """Its settings of the loss, sampling temperature and vocabulary are those of the other terms too."""
    sampled: tuple[TokenTerm, ...] = ()
    """Terms on sampled tokens, and what is measured on them. Where there are some, `loss/distill` is reported too."""
    has_answers_of_others: bool = False
    """Whether there may be tokens that the student did not sample: the loss is then reported by who did."""

    measures_agreement: bool = False
    """Whether the agreement with the teachers is a metric too, which takes another look at all logits."""

    def metric_names(self) -> list[str]:
        """Names of the metrics of a call, in the order of tables; they follow from the settings alone."""
        names = self.distillation.metric_names()
        names += agreement.metric_names(self.distillation) if self.measures_agreement else []
        if not self.sampled:
            return names
        split = ["loss/on_policy", "loss/off_policy"] if self.has_answers_of_others else []
        return [*names, *(name for term in self.sampled for name in term.metric_names()), "loss/distill", *split]

    def headlines(self) -> list[Headline]:
        """The metrics of all terms that people are to see, of steps and of evaluations."""
        its = [headline for term in (self.distillation, *self.sampled) for headline in term.headlines()]
        held_out = [replace(h, metric=f"eval/{h.metric}") for h in its if h.metric.startswith("kl/")]
        return [*its, *held_out]

    @property
    def takes_hidden(self) -> bool:
        """Whether a call may be given the student's hidden states and head in place of its logits."""
        return not self.sampled and self.distillation.takes_hidden

    def __call__(self, batch: MicroBatch, student: Logits) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """(sum of the loss over tokens, number of tokens as int32, metrics by name, some or all of `metric_names`).

        `student` are the student's logits at `batch.predicted_at_T`, or their factors; with gradients on, logits may be
        overwritten.
        """
        agreed = agreement.measure(self.distillation, batch, student) if self.measures_agreement else {}
        term = self._total(batch, student)
        num_tokens = torch.tensor(len(term.loss_T), dtype=torch.int, device=term.loss.device)
        return term.loss, num_tokens, {**term.metrics, **agreed}

    @torch.no_grad()
    def by_token(self, batch: MicroBatch, student: Logits) -> torch.Tensor:
        """The loss of every token [T], without a gradient."""
        return self._total(batch, student).loss_T

    def _total(self, batch: MicroBatch, student: Logits) -> TermResult:
        return self._with_sampled(batch, student) if self.sampled else self.distillation(batch, student)

    def _with_sampled(self, batch: MicroBatch, student: Logits) -> TermResult:
        assert isinstance(student, torch.Tensor), "the terms of sampled tokens need logits"
        base = self.distillation
        how = {"sampling_temperature": base.sampling_temperature, "chunk_tokens": base.config.chunk_tokens}
        # First, because the fused loss leaves its gradient in the logits' place.
        others = sampled_tokens(self.sampled, batch, student, base.vocab, **how)
        weight = base.config.weight
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            distill = base(batch, student)
        if weight == 0:
            distill = replace(distill, loss=torch.zeros_like(distill.loss), loss_T=torch.zeros_like(distill.loss_T))
        loss_T = distill.loss_T + others.loss_T
        made = sums({"loss": loss_T, "loss/distill": distill.loss_T, **self._split(batch, loss_T)})
        return TermResult(others.loss + distill.loss, loss_T, {**distill.metrics, **others.metrics, **made})

    def _split(self, batch: MicroBatch, loss_T: torch.Tensor) -> Columns:
        """The loss at the student's own tokens and at those of others."""
        if not self.has_answers_of_others:
            return {}
        return {"loss/on_policy": loss_T[batch.on_policy_T], "loss/off_policy": loss_T[~batch.on_policy_T]}
