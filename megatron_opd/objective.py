"""From a micro-batch and the student's logits to the summed loss, its gradient and metrics, chunk by chunk of tokens.

    p = ensemble(teacher_n hidden @ head_nᵀ / τ, weights)      q = softmax(student logits / τ)
    loss = Σ_tokens D_β(p, q)

A teacher's distribution exists only here, for `chunk_tokens` tokens, on the rank that owns the vocabulary shard. The
gradient with respect to the logits is computed with the loss, chunk by chunk, so nothing of a chunk is kept for the
backward pass but that gradient, and the backward pass does no collective. Masking is done by the micro-batch, which
lists response tokens only; Megatron divides the sum by the global number of tokens.

Shape suffixes: T response tokens of a micro-batch, C tokens of a chunk, L local vocabulary columns, N teachers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_opd import ensemble
from megatron_opd.config import LossConfig
from megatron_opd.losses import divergence, reverse_kl
from megatron_opd.types import MicroBatch
from megatron_opd.vocab import VocabShard


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradient is already known: backward multiplies it by the upstream scalar."""

    @staticmethod
    def forward(ctx: Any, logits_TL: torch.Tensor, loss: torch.Tensor, grad_TL: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(grad_TL)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_TL,) = ctx.saved_tensors
        return grad_TL * upstream.to(grad_TL.dtype), None, None


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss of a run on this rank's shard of the vocabulary.

    `heads` are the teachers' output-head rows of this shard, N tensors [L, D_n] in the teachers' dtypes.
    """

    config: LossConfig
    sampling_temperature: float
    """Temperature of the sampler, for comparing its log-probabilities with the trainer's."""
    vocab: VocabShard
    teacher_names: tuple[str, ...]
    heads: tuple[torch.Tensor, ...]

    def metric_names(self) -> list[str]:
        """Names of the per-token sums that a call returns, in order."""
        return ["loss", "kl/ensemble", *(f"kl/{name}" for name in self.teacher_names), "logprob/student",
                "logprob/teacher", "mismatch/kl"]  # fmt: skip

    def __call__(self, batch: MicroBatch, logits_TL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum of the loss over tokens, number of tokens as int32, metrics [M, 2] float64).

        `logits_TL` are the student's logits at `batch.rows_T`. The metrics are the sum over tokens, and the number of
        tokens summed, of each of `metric_names`.
        """
        num_tokens = logits_TL.shape[0]
        metrics_M2 = torch.zeros(len(self.metric_names()), 2, dtype=torch.float64, device=logits_TL.device)
        grad_TL = torch.empty_like(logits_TL) if torch.is_grad_enabled() else None
        for start in range(0, num_tokens, self.config.chunk_tokens):
            chunk = slice(start, start + self.config.chunk_tokens)
            grad_CL, chunk_M2 = self._chunk(batch, logits_TL[chunk].detach(), chunk)
            metrics_M2 += chunk_M2
            if grad_TL is not None:
                grad_TL[chunk] = grad_CL
        loss = metrics_M2[0, 0].float()
        if grad_TL is not None:
            loss = _WithGradient.apply(logits_TL, loss, grad_TL)
        return loss, torch.tensor(num_tokens, dtype=torch.int, device=logits_TL.device), metrics_M2

    def _chunk(
        self, batch: MicroBatch, logits_CL: torch.Tensor, chunk: slice
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Gradient of the chunk's loss with respect to its logits (None without grad mode), and its metrics [M, 2]."""
        logits_CL.requires_grad_(torch.is_grad_enabled())
        student_CL = self.vocab.log_softmax(logits_CL, self.config.temperature)
        with torch.no_grad():
            teachers, target_CL = self._teachers(batch, chunk)
        loss_C = divergence(student_CL, target_CL, self.vocab, self.config.beta)
        grad_CL = torch.autograd.grad(loss_C.sum(), logits_CL)[0] if torch.is_grad_enabled() else None
        with torch.no_grad():
            if self.sampling_temperature == self.config.temperature:
                sampler_CL = student_CL
            else:
                sampler_CL = self.vocab.log_softmax(logits_CL, self.sampling_temperature)
            ids_C1 = batch.targets_T[chunk, None]
            lag_C = self.vocab.gather(sampler_CL, ids_C1)[:, 0] - batch.behaviour_logp_T[chunk]
            columns = [loss_C, reverse_kl(student_CL, target_CL, self.vocab)]
            # A teacher that was not asked about a token has no row there: its mean is over the others.
            asked_CN = batch.weights_TN[chunk] > 0
            columns += [reverse_kl(student_CL, p_CL, self.vocab)[asked_CN[:, n]] for n, p_CL in enumerate(teachers)]
            columns += [self.vocab.gather(x, ids_C1)[:, 0] for x in (student_CL, target_CL)]
            # k3 estimate of KL(sampler || trainer) on sampled tokens (Schulman): never negative, 0 when the two agree.
            columns.append(lag_C.exp() - 1 - lag_C)
            metrics_M2 = torch.stack([torch.stack([c.double().sum(), c.new_tensor(len(c)).double()]) for c in columns])
        return grad_CL, metrics_M2

    def _teachers(self, batch: MicroBatch, chunk: slice) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Each teacher's log-probabilities and the combined target, all [C, L] at temperature τ."""
        weights_CN = batch.weights_TN[chunk]
        logits = []
        for hidden_TD, head_LD in zip(batch.teacher_hidden, self.heads, strict=True):
            if hidden_TD is None:  # not asked about this micro-batch: its weights are 0, so any row will do
                logits.append(head_LD.new_zeros(len(weights_CN), len(head_LD), dtype=torch.float32))
            else:
                z_CL = hidden_TD[chunk].to(head_LD.dtype) @ head_LD.T
                logits.append(z_CL.float() / self.config.temperature)
        logps = [self.vocab.log_softmax(z_CL) for z_CL in logits]
        if self.config.ensemble == "probs":
            return logps, ensemble.mean_probs(logps, weights_CN)
        return logps, ensemble.mean_logits(logits, weights_CN, self.vocab)
