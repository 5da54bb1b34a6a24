"""From a micro-batch and the student's logits to the summed loss, its gradient and metrics, chunk by chunk of tokens.

    p = ensemble(what teachers told, weights)      q = softmax(student logits / τ)
    loss = Σ_tokens D_β(p, q)                      or, of the sampled token alone, a policy gradient (`losses.py`)

What p is made of, and over which outcomes, is in `targets.py`. A teacher's distribution exists only there, for
`chunk_tokens` tokens, on the rank that owns the vocabulary shard. The gradient with respect to the logits is computed
with the loss, chunk by chunk, so nothing of a chunk is kept for the backward pass but that gradient, and the backward
pass does no collective. Masking is done by the micro-batch, which lists response tokens only; Megatron divides the sum
by the global number of tokens.

Shape suffixes: T response tokens of a micro-batch, C tokens of a chunk, L local vocabulary columns, N teachers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_opd.carriers import Level, Listed, Rows, Student, chunks
from megatron_opd.config import LossConfig, TeacherConfig
from megatron_opd.exact import exact_loss
from megatron_opd.losses import divergence, importance, reverse_kl, sampled_reverse_kl
from megatron_opd.partly import tokens_of
from megatron_opd.targets import Target, Targets
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
    """The loss of a run on this rank's shard of the vocabulary."""

    config: LossConfig
    sampling_temperature: float
    """Temperature of the sampler, for comparing its log-probabilities with the trainer's."""
    vocab: VocabShard
    teachers: tuple[TeacherConfig, ...]
    heads: tuple[torch.Tensor | None, ...]
    """By teacher: the output-head rows of this shard [L, D_n] in the teacher's dtype; None for one that does not tell
    hidden states, and on ranks that do not compute the loss."""
    has_answers_of_others: bool = False
    """Whether there may be tokens that the student did not sample, or with a weight of the cross-entropy."""

    def metric_names(self) -> list[str]:
        """Names of the per-token sums that a call returns, in order."""
        lists = [teacher.name for teacher in self.teachers if teacher.carrier == "topk"]
        return [
            *("loss", "kl/ensemble", *(f"kl/{teacher.name}" for teacher in self.teachers)),
            *("logprob/student", "logprob/teacher", "mismatch/kl"),
            *(f"topk/{name}/{what}" for name in lists for what in ("mass_outside", "overlap")),
            *(("importance/mean", "importance/capped_frac") if self.config.kind == "sampled" else ()),
            *(("sft/nll",) if self.has_answers_of_others else ()),
        ]

    def __call__(self, batch: MicroBatch, logits_TL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum of the loss over tokens, number of tokens as int32, metrics [M, 2] float64).

        `logits_TL` are the student's logits at `batch.rows_T`. The metrics are the sum over tokens, and the number of
        tokens summed, of each of `metric_names`.
        """
        if batch.distill_T is None and not self.has_answers_of_others:
            return self._distillation(batch, logits_TL)
        all_R = torch.arange(len(logits_TL), device=logits_TL.device)
        keep_R = all_R if batch.distill_T is None else batch.distill_T.nonzero()[:, 0]
        loss, _, metrics_M2 = self._distillation(tokens_of(batch, keep_R), logits_TL[keep_R])
        if self.has_answers_of_others:
            entropy, its_12 = self._cross_entropy(batch, logits_TL)
            loss, metrics_M2 = loss + entropy, torch.cat([metrics_M2, its_12])
        metrics_M2[0] = torch.stack([loss.detach().double(), metrics_M2.new_tensor(len(logits_TL))])
        return loss, torch.tensor(len(logits_TL), dtype=torch.int, device=logits_TL.device), metrics_M2

    def _cross_entropy(self, batch: MicroBatch, logits_TL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum over tokens of -w log q(y) at temperature 1, [1, 2] the sum of -log q(y) where w > 0 and its tokens)."""
        if batch.sft_T is None:
            return logits_TL.new_zeros((), dtype=torch.float32), logits_TL.new_zeros(1, 2, dtype=torch.float64)
        keep_R = batch.sft_T.nonzero()[:, 0]
        logp_RL = self.vocab.log_softmax(logits_TL[keep_R])
        nats_R = -self.vocab.gather(logp_RL, batch.targets_T[keep_R, None])[:, 0]
        total = nats_R.detach().double().sum()
        return (batch.sft_T[keep_R] * nats_R).sum(), torch.stack([total, total.new_tensor(len(keep_R))])[None]

    def _distillation(
        self, batch: MicroBatch, logits_TL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The distillation term alone, over all tokens that there are."""
        num_tokens = logits_TL.shape[0]
        if num_tokens and self.config.kind == "distribution" and all(t.carrier == "hidden" for t in self.teachers):
            settings = self.config, self.sampling_temperature, self.vocab, self.heads
            loss, columns = exact_loss(*settings, batch, logits_TL)
            metrics_M2 = torch.stack([torch.stack([c.sum(), c.new_tensor(len(c))]) for c in columns])
            return loss, torch.tensor(num_tokens, dtype=torch.int, device=logits_TL.device), metrics_M2
        names = self.metric_names()[: -1 if self.has_answers_of_others else None]
        metrics_M2 = torch.zeros(len(names), 2, dtype=torch.float64, device=logits_TL.device)
        grad_TL = torch.empty_like(logits_TL) if torch.is_grad_enabled() else None
        for level, rows in chunks(batch, self.teachers, self.config.chunk_tokens):
            grad_CL, columns = self._chunk(batch, logits_TL[rows].detach(), rows, level)
            metrics_M2 += torch.stack(
                [torch.stack([c.detach().double().sum(), c.new_tensor(len(c)).double()]) for c in columns]
            )
            if grad_TL is not None:
                grad_TL[rows] = grad_CL
        loss = metrics_M2[0, 0].float()
        if grad_TL is not None:
            loss = _WithGradient.apply(logits_TL, loss, grad_TL)
        return loss, torch.tensor(num_tokens, dtype=torch.int, device=logits_TL.device), metrics_M2

    def _chunk(
        self, batch: MicroBatch, logits_CL: torch.Tensor, rows: Rows, level: Level
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradient of the chunk's loss with respect to its logits (None without grad mode), and the metrics by token,
        each over the tokens that it has."""
        logits_CL.requires_grad_(torch.is_grad_enabled())
        student_CL = self.vocab.log_softmax(logits_CL, self.config.temperature)
        targets = Targets(self.config, self.vocab, self.heads)
        target = targets.at(batch, rows, level)
        student = targets.student(student_CL, batch.targets_T[rows], target)
        weights: list[torch.Tensor] = []
        if self.config.kind == "sampled":
            weight_C, cut_C = importance(student.sampled_C, batch.behaviour_logp_T[rows], self.config.importance_cap)
            weights = [weight_C, cut_C.to(weight_C.dtype)]
            loss_C = sampled_reverse_kl(student.sampled_C, target.sampled_C, weight_C)
        else:
            loss_C = divergence(*self._compared(student, target), self.config.beta)
        if batch.distill_T is not None:
            loss_C = loss_C * batch.distill_T[rows]
        grad_CL = torch.autograd.grad(loss_C.sum(), logits_CL)[0] if torch.is_grad_enabled() else None
        with torch.no_grad():
            columns = [loss_C, *self._divergences(batch, student, target, rows), student.sampled_C, target.sampled_C]
            columns += [self._mismatch(batch, logits_CL, student, rows), *self._lists(batch, student, target, rows)]
        return grad_CL, [*columns, *weights]

    def _compared(self, student: Student, target: Target) -> tuple[torch.Tensor, torch.Tensor, VocabShard]:
        """Student and target over what both are known on."""
        assert target.logp is not None, "a teacher tells the sampled token alone: loss.kind must be sampled"
        if target.outcomes is None:
            return student.logp_CL, target.logp, self.vocab
        assert student.logp_CO is not None
        return student.logp_CO, target.logp, target.outcomes.space

    def _divergences(self, batch: MicroBatch, student: Student, target: Target, rows: Rows) -> list[torch.Tensor]:
        """kl/ensemble, and kl of each teacher over the tokens it was asked about."""
        if target.logp is None:
            columns = [student.sampled_C - target.sampled_C]
        else:
            columns = [reverse_kl(*self._compared(student, target))]
        asked_CN = batch.weights_TN[rows] > 0
        nothing = columns[0].new_empty(0)
        for n, told in enumerate(target.told):
            columns.append(nothing if told is None else told.reverse_kl(student)[asked_CN[:, n]])
        return columns

    def _mismatch(self, batch: MicroBatch, logits_CL: torch.Tensor, student: Student, rows: Rows) -> torch.Tensor:
        """k3 estimate of KL(sampler || trainer) on sampled tokens (Schulman): never negative, 0 when the two agree."""
        if self.sampling_temperature == self.config.temperature:
            sampler_C = student.sampled_C
        else:
            sampler_CL = self.vocab.log_softmax(logits_CL, self.sampling_temperature)
            sampler_C = self.vocab.gather(sampler_CL, batch.targets_T[rows, None])[:, 0]
        lag_C = sampler_C - batch.behaviour_logp_T[rows]
        if batch.on_policy_T is not None:
            lag_C = lag_C[batch.on_policy_T[rows]]
        return lag_C.exp() - 1 - lag_C

    def _lists(self, batch: MicroBatch, student: Student, target: Target, rows: Rows) -> list[torch.Tensor]:
        """Mass outside and overlap of each top-k teacher, over the tokens it was asked about."""
        columns: list[torch.Tensor] = []
        sizes = [t.top_k for t in self.teachers if t.carrier == "topk"]
        top_CK = None if target.outcomes is None else self.vocab.top(student.logp_CL, max(sizes))
        for n, (teacher, told) in enumerate(zip(self.teachers, target.told, strict=True)):
            if teacher.carrier != "topk":
                continue
            if isinstance(told, Listed) and top_CK is not None:
                asked_C = batch.weights_TN[rows, n] > 0
                kth_C = top_CK[:, min(teacher.top_k, top_CK.shape[-1]) - 1]
                columns += [told.mass_outside()[asked_C], told.overlap(student, kth_C)[asked_C]]
            else:
                columns += [student.sampled_C.new_empty(0)] * 2
        return columns
