"""The distillation term where teachers have tokenizers of their own: `uld.py` at every span, under tensor parallelism.

    loss = Σ_spans Σ_n w_n (matched_n + unmatched_n)

with w_n the teachers' weights: of several teachers the losses are averaged, for their distributions are over different
things. A span counts at its last student token, so the sum is divided by the number of tokens as every other loss is.
Each model's distribution exists for the spans of `chunk_tokens` student tokens, whole on every tensor-parallel rank,
because sorting has no sharded form; all ranks compute the same loss, and each keeps its columns of the gradient.

Shape suffixes: T response tokens of a micro-batch, C tokens of a chunk, Q teacher tokens, G spans, L local columns of
the student's vocabulary, N teachers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_opd.config import CrossTokenizerConfig, LossConfig, TeacherConfig
from megatron_opd.core.scores import Foreign
from megatron_opd.core.types import MicroBatch
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.crosstok.matched import Matched
from megatron_opd.loss.crosstok.uld import Spans, other_tokens, uld
from megatron_opd.loss.metrics import Columns, Compared, comparison, comparison_names, sums
from megatron_opd.loss.term import TermResult, with_gradient
from megatron_opd.tracking.headline import Headline

_ULD = "matched", "unmatched", "aligned_frac"
"""What is measured of each teacher, besides."""


@dataclass(frozen=True, slots=True)
class Foreigner:
    """What the loss needs of a teacher besides its scores, on a rank that computes it."""

    head_LD: torch.Tensor
    """This rank's rows of its output head, of its own vocabulary."""
    vocab: VocabShard
    matched: Matched


@dataclass(frozen=True, slots=True)
class CrossTokenizer:
    """The distance to teachers that cut text in their own way."""

    config: LossConfig
    sampling_temperature: float
    """Temperature of the sampler, for comparing its log-probabilities with the trainer's."""
    vocab: VocabShard
    teachers: tuple[TeacherConfig, ...]
    how: CrossTokenizerConfig
    foreigners: tuple[Foreigner | None, ...]
    """By teacher; None on ranks that do not compute the loss."""

    def metric_names(self) -> list[str]:
        """As `TeacherTerm`; what begins with kl/ and uld/ is by span."""
        names = [teacher.name for teacher in self.teachers]
        return [*comparison_names(names), *(f"uld/{name}/{what}" for name in names for what in _ULD)]

    def headlines(self) -> list[Headline]:
        """The divergence to all teachers, by span."""
        return [Headline("kl/ensemble", "kl(spans)")] if self.teachers else []

    @property
    def heads(self) -> tuple[torch.Tensor | None, ...]:
        """By teacher: this rank's rows of its output head; None on ranks that do not compute the loss."""
        return tuple(foreigner and foreigner.head_LD for foreigner in self.foreigners)

    @property
    def takes_hidden(self) -> bool:
        """Logits are needed."""
        return False

    def __call__(self, batch: MicroBatch, logits_TL: torch.Tensor) -> TermResult:
        """The term at all tokens; leaves the logits alone."""
        num_tokens = len(logits_TL)
        grad_TL = torch.zeros_like(logits_TL) if torch.is_grad_enabled() else None
        sampled = [self._sampled(batch, logits_TL, self.config.temperature)]
        is_same = self.sampling_temperature == self.config.temperature
        sampled.append(sampled[0] if is_same else self._sampled(batch, logits_TL, self.sampling_temperature))
        told = _Told.nothing(num_tokens, len(self.teachers), logits_TL.device)
        for n, score in enumerate(batch.teachers):
            if score is not None:
                for spans_G4 in _chunks(score.spans_G4, self.config.chunk_tokens):
                    self._at_spans(n, score, spans_G4, batch, (logits_TL, grad_TL), told)
        loss = told.loss_T.sum().float()
        if grad_TL is not None:
            loss = with_gradient(loss, logits_TL, grad_TL)
        names = [teacher.name for teacher in self.teachers]
        return TermResult(loss, told.loss_T, sums(told.columns(sampled, batch, names)))

    @torch.no_grad()
    def each_teachers_logp(self, batch: MicroBatch) -> torch.Tensor:
        """Each teacher's log-probabilities of the text of its spans, at the last student token of each, [T, N] float32;
        0 elsewhere."""
        logp_TN = torch.zeros_like(batch.weights_TN)
        for n, (score, foreigner) in enumerate(zip(batch.teachers, self.foreigners, strict=True)):
            if score is not None:
                assert foreigner is not None
                assert score.hidden_QD is not None
                came = []
                both = zip(*(x.split(self.config.chunk_tokens) for x in (score.hidden_QD, score.ids_Q)), strict=True)
                for hidden_CD, ids_C in both:
                    logits_CL = hidden_CD.to(foreigner.head_LD.dtype) @ foreigner.head_LD.T
                    logp_CL = foreigner.vocab.log_softmax(logits_CL, self.config.temperature)
                    came.append(foreigner.vocab.gather(logp_CL, ids_C[:, None])[:, 0].double())
                until_Q1 = torch.nn.functional.pad(torch.cat(came).cumsum(0), (1, 0))
                _, last_G, first_G, stop_G = score.spans_G4.unbind(-1)
                logp_TN[last_G - 1, n] = (until_Q1[stop_G] - until_Q1[first_G]).float()
        return logp_TN

    @torch.no_grad()
    def _sampled(self, batch: MicroBatch, logits_TL: torch.Tensor, temperature: float) -> torch.Tensor:
        """The student's log-probabilities of its tokens, [T]."""
        found = [
            self.vocab.gather(self.vocab.log_softmax(z_CL, temperature), ids_C[:, None])[:, 0]
            for z_CL, ids_C in zip(
                logits_TL.split(self.config.chunk_tokens), batch.targets_T.split(self.config.chunk_tokens), strict=True
            )
        ]
        return torch.cat(found) if found else logits_TL.new_zeros(0)

    def _at_spans(
        self,
        n: int,
        score: Foreign,
        spans_G4: torch.Tensor,
        batch: MicroBatch,
        student: tuple[torch.Tensor, torch.Tensor | None],
        told: _Told,
    ) -> None:
        """Adds what teacher `n` says at some spans to `told`, and to the student's gradient."""
        logits_TL, grad_TL = student
        foreigner = self.foreigners[n]
        assert foreigner is not None
        assert score.hidden_QD is not None
        first, stop = int(spans_G4[:, 0].min()), int(spans_G4[:, 1].max())
        logits_CL = logits_TL[first:stop].detach().requires_grad_(grad_TL is not None)
        ours = self._spans(self.vocab, logits_CL, batch.targets_T[first:stop], spans_G4[:, :2] - first)
        with torch.no_grad():
            t_first, t_stop = int(spans_G4[:, 2].min()), int(spans_G4[:, 3].max())
            hidden_QD = score.hidden_QD[t_first:t_stop].to(foreigner.head_LD.dtype)
            logits_QL = hidden_QD @ foreigner.head_LD.T
            theirs = self._spans(foreigner.vocab, logits_QL, score.ids_Q[t_first:t_stop], spans_G4[:, 2:] - t_first)
        config = self.config
        parts = uld(ours, theirs, foreigner.matched, self.how, beta=config.beta, name=config.divergence)
        last_G = spans_G4[:, 1] - 1
        weight_G = batch.weights_TN[last_G, n] * batch.weight("distill")[last_G]
        loss_G = weight_G * (parts[0] + parts[1])
        if grad_TL is not None:
            grad_TL[first:stop] += torch.autograd.grad(loss_G.sum(), logits_CL)[0]
        with torch.no_grad():
            told.add(n, spans_G4, loss_G, parts, theirs.came())

    def _spans(self, vocab: VocabShard, logits_CL: torch.Tensor, ids_C: torch.Tensor, spans_G2: torch.Tensor) -> Spans:
        """A model at spans of the rows of a chunk."""
        logp_CL = vocab.log_softmax(logits_CL, self.config.temperature)
        came_C = vocab.gather(logp_CL, ids_C[:, None])[:, 0]
        kept_G = spans_G2[:, 0] if self.how.merge == "first" else spans_G2[:, 1] - 1
        others_G = other_tokens(came_C, spans_G2, kept_G)
        return Spans(vocab.whole_columns(logp_CL[kept_G]), others_G, came_C[kept_G])


@dataclass(frozen=True, slots=True)
class _Told:
    """What all teachers said so far, at the last student token of each span; float64."""

    loss_T: torch.Tensor
    by_teacher: list[list[torch.Tensor]]
    """By teacher: matched, unmatched, reverse KL, log-probability of the span's text, 1 where a span ends, and how many
    tokens of the student it has; each [T]."""

    @classmethod
    def nothing(cls, num_tokens: int, num_teachers: int, device: torch.device) -> _Told:
        def zeros() -> torch.Tensor:
            return torch.zeros(num_tokens, dtype=torch.float64, device=device)

        return cls(zeros(), [[zeros() for _ in range(6)] for _ in range(num_teachers)])

    def add(self, n: int, spans_G4: torch.Tensor, loss_G: torch.Tensor, parts: tuple, came_G: torch.Tensor) -> None:
        """At the spans, teacher `n`: the weighted loss, what `uld` gives, and the text's log-probability."""
        last_G = spans_G4[:, 1] - 1
        self.loss_T[last_G] += loss_G.double()
        lengths_G = spans_G4[:, 1] - spans_G4[:, 0]
        values = [*parts, came_G, torch.ones_like(loss_G), lengths_G]
        for column_T, value_G in zip(self.by_teacher[n], values, strict=True):
            column_T[last_G] = value_G.double()

    def columns(self, sampled: list[torch.Tensor], batch: MicroBatch, names: list[str]) -> Columns:
        """The term's metrics. `sampled`: the student's log-probabilities at both temperatures, [T]."""
        weights_TN = batch.weights_TN
        ends = [told[4] > 0 for told in self.by_teacher]
        kls = [told[2][end_T] for told, end_T in zip(self.by_teacher, ends, strict=True)]
        weighted = [weights_TN[:, n] * told[2] for n, told in enumerate(self.by_teacher)]
        some_T = torch.stack(ends).any(0)
        text = [weights_TN[:, n] * told[3] for n, told in enumerate(self.by_teacher)]
        found = Compared(self.loss_T, sum(weighted)[some_T], kls, sampled[0], sum(text), sampled[1])
        columns = dict(comparison(found, names, batch))
        for n, (name, told, end_T) in enumerate(zip(names, self.by_teacher, ends, strict=True)):
            values = told[0][end_T], told[1][end_T], told[5][weights_TN[:, n] > 0]
            columns |= {f"uld/{name}/{what}": x for what, x in zip(_ULD, values, strict=True)}
        return columns


def _chunks(spans_G4: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Consecutive spans with `size` student tokens or fewer between the first and the last (or one that is longer)."""
    rows = spans_G4.tolist()
    start = 0
    for at in range(1, len(rows) + 1):
        if at == len(rows) or rows[at][1] - rows[start][0] > size:
            yield spans_G4[start:at]
            start = at
