"""From a micro-batch and the student's logits to the summed loss, its gradient and metrics, a chunk of tokens at a time.

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
        """(sum of the loss over tokens, number of tokens as int32, sums of `metric_names` [M] float64).

        `logits_TL` are the student's logits at `batch.rows_T`.
        """
        num_tokens = logits_TL.shape[0]
        sums_M = torch.zeros(len(self.metric_names()), dtype=torch.float64, device=logits_TL.device)
        grad_TL = torch.empty_like(logits_TL) if torch.is_grad_enabled() else None
        for start in range(0, num_tokens, self.config.chunk_tokens):
            chunk = slice(start, start + self.config.chunk_tokens)
            grad_CL, chunk_sums_M = self._chunk(batch, logits_TL[chunk].detach(), chunk)
            sums_M += chunk_sums_M
            if grad_TL is not None:
                grad_TL[chunk] = grad_CL
        loss = sums_M[0].float()
        if grad_TL is not None:
            loss = _WithGradient.apply(logits_TL, loss, grad_TL)
        return loss, torch.tensor(num_tokens, dtype=torch.int, device=logits_TL.device), sums_M

    def _chunk(
        self, batch: MicroBatch, logits_CL: torch.Tensor, chunk: slice
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Gradient of the chunk's loss with respect to its logits (None without grad mode), and its metric sums."""
        logits_CL.requires_grad_(torch.is_grad_enabled())
        student_CL = self.vocab.log_softmax(logits_CL / self.config.temperature)
        with torch.no_grad():
            teachers, target_CL = self._teachers(batch, chunk)
        loss_C = divergence(student_CL, target_CL, self.vocab, self.config.beta)
        grad_CL = torch.autograd.grad(loss_C.sum(), logits_CL)[0] if torch.is_grad_enabled() else None
        with torch.no_grad():
            if self.sampling_temperature == self.config.temperature:
                sampler_CL = student_CL
            else:
                sampler_CL = self.vocab.log_softmax(logits_CL / self.sampling_temperature)
            ids_C1 = batch.targets_T[chunk, None]
            lag_C = self.vocab.gather(sampler_CL, ids_C1)[:, 0] - batch.behaviour_logp_T[chunk]
            columns = [loss_C, *self._kls(batch.weights_TN[chunk], student_CL, target_CL, teachers)]
            columns += [self.vocab.gather(x, ids_C1)[:, 0] for x in (student_CL, target_CL)]
            # k3 estimate of KL(sampler || trainer) on sampled tokens (Schulman): never negative, 0 when the two agree.
            columns.append(lag_C.exp() - 1 - lag_C)
            sums_M = torch.stack([column_C.double().sum() for column_C in columns])
        return grad_CL, sums_M

    def _teachers(self, batch: MicroBatch, chunk: slice) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Each teacher's log-probabilities and the combined target, all [C, L] at temperature τ."""
        assert batch.teacher_hidden is not None
        logits = [
            (hidden_TD[chunk].to(head_LD.dtype) @ head_LD.T).float() / self.config.temperature
            for hidden_TD, head_LD in zip(batch.teacher_hidden, self.heads, strict=True)
        ]
        logps = [self.vocab.log_softmax(z_CL) for z_CL in logits]
        weights_CN = batch.weights_TN[chunk]
        if self.config.ensemble == "probs":
            return logps, ensemble.mean_probs(logps, weights_CN)
        return logps, ensemble.mean_logits(logits, weights_CN, self.vocab)

    def _kls(
        self, weights_CN: torch.Tensor, student_CL: torch.Tensor, target_CL: torch.Tensor, teachers: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Reverse KL to the target and to each teacher, [C] each; 0 where a teacher was not asked (it has no row)."""
        to_teachers = [
            torch.where(weights_CN[:, n] > 0, reverse_kl(student_CL, teacher_CL, self.vocab), 0.0)
            for n, teacher_CL in enumerate(teachers)
        ]
        return [reverse_kl(student_CL, target_CL, self.vocab), *to_teachers]
