"""The distillation term: from a micro-batch and the student's logits to its sum, gradient and metrics.

    p = ensemble(what teachers told, weights)      q = softmax(student logits / τ)
    loss = Σ_tokens w D_β(p, q)                    or, of the sampled token alone, `divergences.py`, `estimators.py`

with w the micro-batch's weights of `distill`. What p is made of, and over which outcomes, is in `targets.py`. A
teacher's distribution exists only there, for `chunk_tokens` tokens, on the rank that owns the shard. The gradient with
respect to the logits is computed with the loss, chunk by chunk, so nothing of a chunk is kept for the backward pass but
that gradient, and the backward pass does no collective.

Shape suffixes: T response tokens of a micro-batch, C tokens of a chunk, L local vocabulary columns, N teachers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from megatron_opd.config import LossConfig, TeacherConfig
from megatron_opd.core.batching import select
from megatron_opd.core.scores import CARRIERS, Head, Level, TokenRows
from megatron_opd.core.types import MicroBatch
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss import divergence, importance, reverse_kl, sampled_reverse_kl
from megatron_opd.loss.estimators import k2, k3
from megatron_opd.loss.from_hidden import exact_loss
from megatron_opd.loss.fused import FactoredLogits, Logits, LossSpec
from megatron_opd.loss.metrics import Columns, Compared, comparison, comparison_names, sums
from megatron_opd.loss.targets import Target, Targets
from megatron_opd.loss.term import Chunk, TermResult, of_chunks
from megatron_opd.loss.told import StudentLogps, chunks
from megatron_opd.tracking.headline import Headline

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
    spec: LossSpec = field(init=False)
    """The divergence and the metrics, as the fused loss is asked for them."""

    def __post_init__(self) -> None:
        """The settings as the fused loss reads them."""
        config = self.config
        spec = LossSpec(
            config.beta, config.temperature, config.ensemble, len(self.teachers),
            by_teacher=True, sampling_temperature=self.sampling_temperature, divergence=config.divergence,
        )  # fmt: skip
        object.__setattr__(self, "spec", spec)

    def metric_names(self) -> list[str]:
        """As `TeacherTerm`."""
        return [
            *comparison_names(self._names),
            *(f"topk/{name}/{what}" for name in self._list_sizes for what in ("mass_outside", "overlap")),
            *(("importance/mean", "importance/capped_frac") if self.config.kind == "sampled" else ()),
        ]

    def headlines(self) -> list[Headline]:
        """The divergence to all teachers, by the name of what is known of it (docs/metrics.md, carriers)."""
        levels = [CARRIERS[teacher.carrier].level for teacher in self.teachers]
        known = {Level.EXACT: "kl", Level.LISTED: "kl(top-k)", Level.SAMPLED: "kl(k1)"}
        return [Headline("kl/ensemble", known[max(levels)])] if levels else []

    @property
    def _names(self) -> list[str]:
        return [teacher.name for teacher in self.teachers]

    @property
    def _list_sizes(self) -> dict[str, int]:
        """By the name of a teacher that lists ids, how many."""
        return {t.name: t.top_k for t in self.teachers if CARRIERS[t.carrier].level is Level.LISTED}

    @property
    def takes_hidden(self) -> bool:
        """Whether a call may be given the student's hidden states and head in place of its logits."""
        return self.config.kind == "distribution" and all(CARRIERS[t.carrier].is_hidden for t in self.teachers)

    def __call__(self, batch: MicroBatch, student: Logits) -> TermResult:
        """The term at all tokens; those that no teacher is asked about, whose weight is 0, have no part in it.

        `student` are the student's logits at `batch.predicted_at_T`, or their factors; with gradients on, logits may be
        overwritten.
        """
        asked_T = (batch.weights_TN > 0).any(-1)
        return self._at_all(batch, student) if bool(asked_T.all()) else self._at_some(batch, student, asked_T)

    def _at_some(self, batch: MicroBatch, student: Logits, asked_T: torch.Tensor) -> TermResult:
        """The term where teachers are asked about some tokens (bool) only."""
        loss_T = torch.zeros(len(asked_T), dtype=torch.float64, device=asked_T.device)
        if not bool(asked_T.any()):
            rows = student.hidden_TD if isinstance(student, FactoredLogits) else student
            return TermResult(rows[:0].sum().float(), loss_T, sums({"loss": loss_T}))
        term = self._at_all(select(batch, asked_T), _rows_of(student, asked_T))
        loss_T[asked_T] = term.loss_T
        of_all = torch.stack([term.metrics["loss"][0], loss_T.new_tensor(len(loss_T))])
        return TermResult(term.loss, loss_T, {**term.metrics, "loss": of_all})

    @torch.no_grad()
    def teachers_logp(self, batch: MicroBatch) -> torch.Tensor:
        """The combined teachers' log-probabilities of the sampled tokens, [T] in float32; 0 where none is asked."""
        asked_T = (batch.weights_TN > 0).any(-1)
        logp_T = torch.zeros(len(asked_T), device=asked_T.device)
        asked = select(batch, asked_T)
        known_T = asked.targets_T.new_zeros(len(asked.targets_T), dtype=torch.float32)
        for level, rows in chunks(asked, self.config.chunk_tokens):
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
        for level, rows in chunks(asked, self.config.chunk_tokens):
            for n, told in enumerate(Targets(self.config, self.vocab, self.heads).at(asked, rows, level).told):
                if told is not None:
                    known_TN[rows, n] = told.sampled_C.float()
        logp_TN = torch.zeros_like(batch.weights_TN)
        logp_TN[asked_T] = known_TN
        return torch.where(asked_TN, logp_TN, 0.0)

    def _at_all(self, batch: MicroBatch, student: Logits) -> TermResult:
        """The term where teachers are asked about every token."""
        if len(batch.targets_T) and self.takes_hidden:
            chunk_tokens, backend = self.config.chunk_tokens, self.config.backend
            loss, found = exact_loss(
                self.spec, self.vocab, self.heads, batch, student, chunk_tokens=chunk_tokens, backend=backend
            )
            return TermResult(loss, found.loss_C, sums(comparison(found, self._names, batch)))
        assert isinstance(student, torch.Tensor), "logits are needed where a teacher tells less than hidden states"
        parts = chunks(batch, self.config.chunk_tokens)
        return of_chunks(student, (self._chunk(batch, student[rows].detach(), rows, level) for level, rows in parts))

    def _chunk(self, batch: MicroBatch, logits_CL: torch.Tensor, rows: TokenRows, level: Level) -> Chunk:
        """The gradient of a chunk's loss with respect to its logits, made with the loss."""
        logits_CL.requires_grad_(torch.is_grad_enabled())
        student_CL = self.vocab.log_softmax(logits_CL, self.config.temperature)
        targets = Targets(self.config, self.vocab, self.heads)
        target = targets.at(batch, rows, level)
        student = targets.student(student_CL, batch.targets_T[rows], target)
        loss_C, weights = self._loss(batch, student, target, rows)
        loss_C = loss_C * batch.weight("distill")[rows]
        grad_CL = torch.autograd.grad(loss_C.sum(), logits_CL)[0] if torch.is_grad_enabled() else None
        with torch.no_grad():
            found = Compared(
                loss_C,
                *self._divergences(batch, student, target, rows),
                student.sampled_C,
                target.sampled_C,
                self._at_sampling_temperature(batch, logits_CL, student, rows),
            )
            its = comparison(found, self._names, batch, rows)
            return rows, grad_CL, loss_C, {**its, **self._lists(batch, student, target, rows), **weights}

    def _loss(
        self, batch: MicroBatch, student: StudentLogps, target: Target, rows: TokenRows
    ) -> tuple[torch.Tensor, Columns]:
        """(the loss by token without its weight, metrics of importance weights where there are some)."""
        if self.config.kind == "distribution":
            space = self._compared(student, target)
            return divergence(*space, self.config.beta, self.config.divergence), {}
        weight_C, cut_C = importance(student.sampled_C, batch.behaviour_logp_T[rows], self.config.importance_cap)
        loss_C = _SAMPLED[self.config.estimator](student.sampled_C, target.sampled_C, weight_C)
        return loss_C, {"importance/mean": weight_C, "importance/capped_frac": cut_C.to(weight_C.dtype)}

    def _compared(self, student: StudentLogps, target: Target) -> tuple[torch.Tensor, torch.Tensor, VocabShard]:
        """Student and target over what both are known on."""
        assert target.logp is not None, "a teacher tells the sampled token alone: loss.kind must be sampled"
        if target.outcomes is None:
            return student.logp_CL, target.logp, self.vocab
        assert student.logp_CO is not None
        return student.logp_CO, target.logp, target.outcomes.space

    def _divergences(
        self, batch: MicroBatch, student: StudentLogps, target: Target, rows: TokenRows
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(KL to the target, KL to each teacher over the tokens it was asked about)."""
        if target.logp is None:
            ensemble_C = student.sampled_C - target.sampled_C
        else:
            ensemble_C = reverse_kl(*self._compared(student, target))
        asked_CN = batch.weights_TN[rows] > 0
        nothing = ensemble_C.new_empty(0)
        by_teacher = [
            nothing if told is None else told.reverse_kl(student)[asked_CN[:, n]] for n, told in enumerate(target.told)
        ]
        return ensemble_C, by_teacher

    def _at_sampling_temperature(
        self, batch: MicroBatch, logits_CL: torch.Tensor, student: StudentLogps, rows: TokenRows
    ) -> torch.Tensor:
        """The student's log-probabilities of the sampled tokens at the sampler's temperature."""
        if self.sampling_temperature == self.config.temperature:
            return student.sampled_C
        sampler_CL = self.vocab.log_softmax(logits_CL, self.sampling_temperature)
        return self.vocab.gather(sampler_CL, batch.targets_T[rows, None])[:, 0]

    def _lists(self, batch: MicroBatch, student: StudentLogps, target: Target, rows: TokenRows) -> Columns:
        """Figures about the lists of top-k teachers, over the tokens that each was asked about."""
        columns: dict[str, torch.Tensor] = {}
        sizes = self._list_sizes
        if target.outcomes is None or not sizes:
            return columns
        top_CK = self.vocab.top(student.logp_CL, max(sizes.values()))
        for n, (name, told) in enumerate(zip(self._names, target.told, strict=True)):
            if told is not None and name in sizes:
                asked_C = batch.weights_TN[rows, n] > 0
                found = told.list_metrics(student, top_CK[:, min(sizes[name], top_CK.shape[-1]) - 1])
                columns |= {f"topk/{name}/{what}": x_C[asked_C] for what, x_C in found.items()}
        return columns


def _rows_of(student: Logits, keep_T: torch.Tensor) -> Logits:
    """The student at some of the tokens (bool) only."""
    return (
        replace(student, hidden_TD=student.hidden_TD[keep_T])
        if isinstance(student, FactoredLogits)
        else student[keep_T]
    )
