"""The terms that know the student at the response tokens alone: the policy gradient and the cross-entropy.

Their log-probabilities are computed a chunk of tokens at a time, and the gradient with respect to the logits with them,
so that the one tensor of the logits' size that they add is that gradient. The policy is the sampler's distribution, at
the sampling temperature; the cross-entropy is the model's own, at temperature 1.

Shape suffixes: T response tokens of a micro-batch, C tokens of a chunk, L local vocabulary columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_opd.config import PolicyConfig
from megatron_opd.core.types import MicroBatch
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.policy_gradient import policy_gradient
from megatron_opd.loss.term import Term, of_chunks

_METRICS = ("loss", "loss/policy", "loss/sft", "policy/ratio", "policy/clip_frac", "sft/nll", "entropy")


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Both terms, each where the run has it; their metrics are there in any case."""

    policy: PolicyConfig | None
    """None: no policy gradient."""
    has_cross_entropy: bool
    temperature: float
    """Of the sampler."""
    vocab: VocabShard
    chunk_tokens: int

    def metric_names(self) -> list[str]:
        """Names of the per-token sums of a term, in order."""
        return list(_METRICS)

    def __call__(self, batch: MicroBatch, logits_TL: torch.Tensor) -> Term:
        """The term; leaves the logits alone."""
        parts = (slice(at, at + self.chunk_tokens) for at in range(0, len(logits_TL), self.chunk_tokens))
        made = ((rows, *self._chunk(batch, logits_TL[rows].detach(), rows)) for rows in parts)
        return of_chunks(logits_TL, made, len(_METRICS))

    def _chunk(
        self, batch: MicroBatch, logits_CL: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradient with respect to the chunk's logits (None without grad mode), and the metrics by token."""
        logits_CL.requires_grad_(torch.is_grad_enabled())
        ids_C1, behaviour_C = batch.targets_T[rows, None], batch.behaviour_logp_T[rows]
        logp_CL = self.vocab.log_softmax(logits_CL, self.temperature)
        logp_C = self.vocab.gather(logp_CL, ids_C1)[:, 0]
        nothing = logp_C.detach()[:0]
        policy_C = sft_C = torch.zeros_like(logp_C)
        ratio_C = cut_C = nll_C = nothing
        if self.policy is not None:
            advantage_C, own_C = batch.advantage_T[rows], batch.on_policy_T[rows]
            policy_C, ratio_C, cut_C = policy_gradient(logp_C, behaviour_C, advantage_C, self.policy)
            ratio_C, cut_C = ratio_C[own_C], cut_C[own_C]
        if self.has_cross_entropy:
            own_CL = logp_CL if self.temperature == 1 else self.vocab.log_softmax(logits_CL)
            own_logp_C = self.vocab.gather(own_CL, ids_C1)[:, 0]
            sft_C = cross_entropy(own_logp_C, batch.sft_T[rows])
            nll_C = -own_logp_C.detach()[batch.sft_T[rows] > 0]
        loss_C = policy_C + sft_C
        grad_CL = None
        if torch.is_grad_enabled():  # without both terms the loss is a constant
            has_gradient = loss_C.requires_grad
            grad_CL = torch.autograd.grad(loss_C.sum(), logits_CL)[0] if has_gradient else torch.zeros_like(logits_CL)
        with torch.no_grad():
            entropy_C = -self.vocab.sum(logp_CL.exp() * logp_CL)
        return grad_CL, [loss_C, policy_C, sft_C, ratio_C, cut_C.double(), nll_C, entropy_C]


def cross_entropy(logp_T: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
    """-w log q(y), [T] -> [T], for answers that the student did not write.

    On answers of a teacher it is sequence-level KD (Kim and Rush, arXiv:1606.07947).
    """
    return -weight_T * logp_T
