"""The terms that know the student at the learnt tokens alone: the policy gradient, the cross-entropy, the entropy.

Their log-probabilities are computed a chunk of tokens at a time, and the gradient of their sum with respect to the
logits with them, so that the one tensor of the logits' size that all of them add is that gradient. The policy is the
sampler's distribution, at the sampling temperature; the cross-entropy is the model's own, at temperature 1.

Shape suffixes: T learnt tokens of a micro-batch, C tokens of a chunk, L local vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_opd.config import PolicyConfig
from megatron_opd.core.types import MicroBatch
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.metrics import Columns
from megatron_opd.loss.policy_gradient import policy_gradient
from megatron_opd.loss.term import StudentTokens, TermResult, TokenTerm, of_chunks
from megatron_opd.tracking.headline import Headline


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """Advantages times log-probabilities, by ratios to the sampler; the advantages are the weights of `policy`."""

    how: PolicyConfig

    def metric_names(self) -> list[str]:
        """The ratios are those of the student's own tokens."""
        return ["loss/policy", "policy/ratio", "policy/clip_frac"]

    def headlines(self) -> list[Headline]:
        """How many tokens were cut: 0 while answers are fresh."""
        return [Headline("policy/clip_frac", "clipped", "{:.2g}")]

    def __call__(self, batch: MicroBatch, rows: slice, student: StudentTokens) -> tuple[torch.Tensor, Columns]:
        """As `TokenTerm`."""
        logp_C = student.sampled(student.sampling_temperature)
        behaviour_C, own_C = batch.behaviour_logp_T[rows], batch.on_policy_T[rows]
        loss_C, ratio_C, cut_C = policy_gradient(logp_C, behaviour_C, batch.weight("policy")[rows], self.how)
        return loss_C, {
            "loss/policy": loss_C,
            "policy/ratio": ratio_C[own_C],
            "policy/clip_frac": cut_C[own_C].double(),
        }


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """-w log q(y), for answers that the student did not write; w are the weights of `sft`.

    On answers of a teacher it is sequence-level KD (Kim and Rush, arXiv:1606.07947).
    """

    def metric_names(self) -> list[str]:
        """`sft/nll` is of the tokens that have a weight."""
        return ["loss/sft", "sft/nll"]

    def headlines(self) -> list[Headline]:
        """One."""
        return [Headline("sft/nll", "nll")]

    def __call__(self, batch: MicroBatch, rows: slice, student: StudentTokens) -> tuple[torch.Tensor, Columns]:
        """As `TokenTerm`."""
        logp_C, weight_C = student.sampled(1.0), batch.weight("sft")[rows]
        loss_C = -weight_C * logp_C
        return loss_C, {"loss/sft": loss_C, "sft/nll": -logp_C.detach()[weight_C > 0]}


@dataclass(frozen=True, slots=True)
class Entropy:
    """The policy's entropy, measured only."""

    def metric_names(self) -> list[str]:
        """One."""
        return ["entropy"]

    def headlines(self) -> list[Headline]:
        """One."""
        return [Headline("entropy", "entropy", "{:.3g}")]

    def __call__(self, batch: MicroBatch, rows: slice, student: StudentTokens) -> tuple[None, Columns]:
        """As `TokenTerm`."""
        with torch.no_grad():
            logp_CL = student.logp(student.sampling_temperature)
            return None, {"entropy": -student.vocab.sum(logp_CL.exp() * logp_CL)}


@dataclass(frozen=True, slots=True)
class Likeliest:
    """The share of the learnt tokens that are the student's likeliest ones where they stand, measured only."""

    def metric_names(self) -> list[str]:
        """One."""
        return ["likeliest"]

    def headlines(self) -> list[Headline]:
        """None: whoever measures by it names the result."""
        return []

    def __call__(self, batch: MicroBatch, rows: slice, student: StudentTokens) -> tuple[None, Columns]:
        """As `TokenTerm`."""
        return None, {"likeliest": (student.vocab.likeliest(student.logits_CL) == student.ids_C).double()}


def sampled_tokens(
    terms: Sequence[TokenTerm],
    batch: MicroBatch,
    logits_TL: torch.Tensor,
    vocab: VocabShard,
    *,
    sampling_temperature: float,
    chunk_tokens: int,
) -> TermResult:
    """The sum of some terms, in one pass over the logits, which stay as they are."""

    def made(rows: slice) -> tuple[torch.Tensor | None, torch.Tensor, Columns]:
        logits_CL = logits_TL[rows].detach().requires_grad_(torch.is_grad_enabled())
        return _chunk(terms, batch, rows, StudentTokens(logits_CL, batch.targets_T[rows], vocab, sampling_temperature))

    parts = (slice(at, at + chunk_tokens) for at in range(0, len(logits_TL), chunk_tokens))
    return of_chunks(logits_TL, ((rows, *made(rows)) for rows in parts))


def _chunk(
    terms: Sequence[TokenTerm], batch: MicroBatch, rows: slice, student: StudentTokens
) -> tuple[torch.Tensor | None, torch.Tensor, Columns]:
    """(gradient with respect to the chunk's logits, None without grad mode; loss by token; metrics)."""
    losses, columns = [], {}
    for term in terms:
        loss_C, its = term(batch, rows, student)
        losses += [] if loss_C is None else [loss_C]
        columns |= its
    loss_C = sum(losses) if losses else torch.zeros_like(student.logp(student.sampling_temperature)[:, 0])
    if not torch.is_grad_enabled():
        return None, loss_C, columns
    if not loss_C.requires_grad:  # all terms only measure
        return torch.zeros_like(student.logits_CL), loss_C, columns
    return torch.autograd.grad(loss_C.sum(), student.logits_CL)[0], loss_C, columns
