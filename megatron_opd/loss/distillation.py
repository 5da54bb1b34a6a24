"""The distillation term: from a micro-batch and the student's logits to its sum, gradient and metrics.

    p = ensemble(what teachers told, weights)      q = softmax(student logits / τ)
    loss = Σ_tokens w D_β(p, q)                    or, of the sampled token alone, `divergences.py`, `estimators.py`

with w the micro-batch's `distill_T`. What p is made of, and over which outcomes, is in `targets.py`. A teacher's
distribution exists only there, for `chunk_tokens` tokens, on the rank that owns the vocabulary shard. The gradient with
respect to the logits is computed with the loss, chunk by chunk, so nothing of a chunk is kept for the backward pass but
that gradient, and the backward pass does no collective.

Shape suffixes: T response tokens of a micro-batch, C tokens of a chunk, L local vocabulary columns, N teachers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_opd.config import LossConfig, TeacherConfig
from megatron_opd.core.batching import select
from megatron_opd.core.protocols import Head
from megatron_opd.core.types import MicroBatch
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss import divergence, importance, reverse_kl, sampled_reverse_kl
from megatron_opd.loss.estimators import k2, k3
from megatron_opd.loss.from_hidden import exact_loss
from megatron_opd.loss.fused import FactoredLogits, Logits
from megatron_opd.loss.targets import Target, Targets
from megatron_opd.loss.term import Term, of_chunks, sums
from megatron_opd.loss.told import ChunkRows, Level, Listed, StudentLogps, chunks

_SAMPLED = {"policy_gradient": sampled_reverse_kl, "k2": k2, "k3": k3}
"""Losses of the sampled token by the name of their estimator."""


@dataclass(frozen=True, slots=True)
class Distillation:
    """The distance to the teachers on this rank's shard of the vocabulary."""

    config: LossConfig
    sampling_temperature: float
    """Temperature of the sampler, for comparing its log-probabilities with the trainer's."""
    vocab: VocabShard
    teachers: tuple[TeacherConfig, ...]
    heads: tuple[Head | None, ...]
    """By teacher: the output-head rows of this shard [L, D_n] in the teacher's dtype; None for one that does not tell
    hidden states, and on ranks that do not compute the loss."""

    def metric_names(self) -> list[str]:
        """Names of the per-token sums that a call returns, in order."""
        lists = [teacher.name for teacher in self.teachers if teacher.carrier == "topk"]
        return [
            *("loss", "kl/ensemble", *(f"kl/{teacher.name}" for teacher in self.teachers)),
            *("logprob/student", "logprob/teacher", "mismatch/kl"),
            *(f"topk/{name}/{what}" for name in lists for what in ("mass_outside", "overlap")),
            *(("importance/mean", "importance/capped_frac") if self.config.kind == "sampled" else ()),
        ]

    @property
    def takes_hidden(self) -> bool:
        """Whether a call may be given the student's hidden states and head in place of its logits."""
        return self.config.kind == "distribution" and all(t.carrier == "hidden" for t in self.teachers)

    def __call__(self, batch: MicroBatch, student: Logits) -> Term:
        """The term at all tokens; those that no teacher is asked about, whose `distill_T` is 0, have no part in it.

        `student` are the student's logits at `batch.predicted_at_T`, or their factors; with gradients on,
        logits may be overwritten. The metrics are those of `metric_names`.
        """
        asked_T = (batch.weights_TN > 0).any(-1)
        if bool(asked_T.all()):
            return self._at_all(batch, student)
        loss_T = torch.zeros(len(asked_T), dtype=torch.float64, device=asked_T.device)
        if not bool(asked_T.any()):
            metrics_M2 = torch.zeros(len(self.metric_names()), 2, dtype=torch.float64, device=asked_T.device)
            metrics_M2[0, 1] = len(asked_T)
            rows = student.hidden_TD if isinstance(student, FactoredLogits) else student
            return Term(rows[:0].sum().float(), loss_T, metrics_M2)
        term = self._at_all(select(batch, asked_T), _rows_of(student, asked_T))
        loss_T[asked_T] = term.loss_T
        term.metrics_M2[0, 1] = len(asked_T)
        return Term(term.loss, loss_T, term.metrics_M2)

    @torch.no_grad()
    def teachers_logp(self, batch: MicroBatch) -> torch.Tensor:
        """The combined teachers' log-probabilities of the sampled tokens, [T] in float32; 0 where none is asked."""
        asked_T = (batch.weights_TN > 0).any(-1)
        logp_T = torch.zeros(len(asked_T), device=asked_T.device)
        asked = select(batch, asked_T)
        known_T = asked.targets_T.new_zeros(len(asked.targets_T), dtype=torch.float32)
        for level, rows in chunks(asked, self.teachers, self.config.chunk_tokens):
            known_T[rows] = Targets(self.config, self.vocab, self.heads).at(asked, rows, level).sampled_C.float()
        logp_T[asked_T] = known_T
        return logp_T

    @torch.no_grad()
    def each_teachers_logp(self, batch: MicroBatch) -> torch.Tensor:
        """Each teacher's own log-probabilities of the sampled tokens, [T, N] in float32; 0 where it is not asked."""
        asked_TN = batch.weights_TN > 0
        asked_T = asked_TN.any(-1)
        asked = select(batch, asked_T)
        known_TN = torch.zeros_like(asked.weights_TN)
        for level, rows in chunks(asked, self.teachers, self.config.chunk_tokens):
            for n, told in enumerate(Targets(self.config, self.vocab, self.heads).at(asked, rows, level).told):
                if told is not None:
                    known_TN[rows, n] = told.sampled_C.float()
        logp_TN = torch.zeros_like(batch.weights_TN)
        logp_TN[asked_T] = known_TN
        return torch.where(asked_TN, logp_TN, 0.0)

    def _at_all(self, batch: MicroBatch, student: Logits) -> Term:
        """The term where teachers are asked about every token."""
        if len(batch.targets_T) and self.takes_hidden:
            settings = self.config, self.sampling_temperature, self.vocab, self.heads
            loss, columns = exact_loss(*settings, batch, student)
            return Term(loss, columns[0], sums(columns))
        assert isinstance(student, torch.Tensor), "logits are needed where a teacher tells less than hidden states"
        parts = chunks(batch, self.teachers, self.config.chunk_tokens)
        made = ((rows, *self._chunk(batch, student[rows].detach(), rows, level)) for level, rows in parts)
        return of_chunks(student, made, len(self.metric_names()))

    def _chunk(
        self, batch: MicroBatch, logits_CL: torch.Tensor, rows: ChunkRows, level: Level
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
            loss_C = _SAMPLED[self.config.estimator](student.sampled_C, target.sampled_C, weight_C)
        else:
            loss_C = divergence(*self._compared(student, target), self.config.beta, self.config.divergence)
        loss_C = loss_C * batch.distill_T[rows]
        grad_CL = torch.autograd.grad(loss_C.sum(), logits_CL)[0] if torch.is_grad_enabled() else None
        with torch.no_grad():
            columns = [loss_C, *self._divergences(batch, student, target, rows), student.sampled_C, target.sampled_C]
            columns += [self._mismatch(batch, logits_CL, student, rows), *self._lists(batch, student, target, rows)]
        return grad_CL, [*columns, *weights]

    def _compared(self, student: StudentLogps, target: Target) -> tuple[torch.Tensor, torch.Tensor, VocabShard]:
        """Student and target over what both are known on."""
        assert target.logp is not None, "a teacher tells the sampled token alone: loss.kind must be sampled"
        if target.outcomes is None:
            return student.logp_CL, target.logp, self.vocab
        assert student.logp_CO is not None
        return student.logp_CO, target.logp, target.outcomes.space

    def _divergences(
        self, batch: MicroBatch, student: StudentLogps, target: Target, rows: ChunkRows
    ) -> list[torch.Tensor]:
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

    def _mismatch(
        self, batch: MicroBatch, logits_CL: torch.Tensor, student: StudentLogps, rows: ChunkRows
    ) -> torch.Tensor:
        """k3 estimate of KL(sampler || trainer) on the student's own tokens (Schulman): never negative, 0 when the two
        agree."""
        if self.sampling_temperature == self.config.temperature:
            sampler_C = student.sampled_C
        else:
            sampler_CL = self.vocab.log_softmax(logits_CL, self.sampling_temperature)
            sampler_C = self.vocab.gather(sampler_CL, batch.targets_T[rows, None])[:, 0]
        lag_C = (sampler_C - batch.behaviour_logp_T[rows])[batch.on_policy_T[rows]]
        return lag_C.exp() - 1 - lag_C

    def _lists(self, batch: MicroBatch, student: StudentLogps, target: Target, rows: ChunkRows) -> list[torch.Tensor]:
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


def _rows_of(student: Logits, keep_T: torch.Tensor) -> Logits:
    """The student at some of the tokens (bool) only."""
    return (
        replace(student, hidden_TD=student.hidden_TD[keep_T])
        if isinstance(student, FactoredLogits)
        else student[keep_T]
    )
