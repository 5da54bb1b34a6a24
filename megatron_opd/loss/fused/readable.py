"""The loss of rows by the formulas themselves: any divergence of `DIVERGENCES`, differentiated by autograd in float64.

It runs what no fused backend supports, in the same chunks, with the same ensembles, metrics and exchanges of the
gradient, so that a new divergence is its formula and nothing else. It is several times slower than fused kernels.

Shape suffixes: R rows, C rows of a part, L local columns, N teachers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss import ensemble
from megatron_opd.loss.divergences import divergence, reverse_kl
from megatron_opd.loss.fused.passes import Known, PassInputs
from megatron_opd.loss.fused.reference import Reference
from megatron_opd.loss.fused.statistics import LogitRows, LossSpec
from megatron_opd.loss.fused.token_results import TokenResults

_VALUES_AT_A_TIME = 1 << 20


class Readable:
    """The backend that supports everything."""

    name = "readable"

    def begin(self, inputs: PassInputs) -> ReadablePass:
        """A pass, not yet started."""
        return ReadablePass(inputs)

    def scale(self, grad_TL: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """As `Reference.scale`."""
        return Reference().scale(grad_TL, factor)


class ReadablePass:
    """All of it happens at the end: formulas exchange what they need on the way."""

    def __init__(self, inputs: PassInputs) -> None:
        self.inputs, self.rows = inputs, inputs.rows

    def start(self) -> None:
        """Nothing."""

    def middle(self) -> None:
        """Nothing."""

    def known(self) -> Known | None:
        """Nothing: another pass computes everything again."""
        return None

    def finish(self) -> TokenResults:
        """The results; the gradient takes the place of the student's rows."""
        return TokenResults.joined([self._part(at, rows) for at, rows in self._parts()])

    def _parts(self) -> Iterator[tuple[slice, LogitRows]]:
        """As many on every shard, whatever columns it has."""
        size = max(_VALUES_AT_A_TIME // self.inputs.vocab.size, 1)
        for start in range(0, self.rows.num_rows, size):
            yield slice(start, start + size), self.rows.part(start, start + size)

    def _part(self, at: slice, rows: LogitRows) -> TokenResults:
        inputs, spec = self.inputs, self.inputs.asked
        compared = _Compared.of(rows, spec, inputs.vocab, wants_gradient=inputs.scale_R is not None)
        vocab, target_CL = compared.vocab, compared.target_CL
        with torch.set_grad_enabled(inputs.scale_R is not None):
            student_CL = vocab.log_softmax(compared.student_CL, spec.temperature)
            loss_C = divergence(student_CL, target_CL, vocab, spec.beta, spec.divergence)
        if inputs.scale_R is not None:
            [grad_CL] = torch.autograd.grad(loss_C, compared.student_CL, inputs.scale_R[at])
            rows.replace_student(grad_CL[:, : rows.width])
        student_CL, loss_C = student_CL.detach(), loss_C.detach()
        reverse_C = reverse_kl(student_CL, target_CL, vocab)
        is_bad_C = compared.is_bad() | ~(loss_C.isfinite() & reverse_C.isfinite())
        sampled = compared.sampled(student_CL, inputs.ids_R[at]) if inputs.ids_R is not None else (None, None, None)
        by_teacher_CN = compared.reverse_kl_to_each(student_CL) if spec.by_teacher else None
        return TokenResults(loss_C.masked_fill(is_bad_C, math.nan), reverse_C, by_teacher_CN, *sampled, is_bad_C)


@dataclass(frozen=True, slots=True)
class _Compared:
    """Student and teachers at rows, float64, over columns of which at least one is here."""

    spec: LossSpec
    vocab: VocabShard
    student_CL: torch.Tensor
    """Logits, with a gradient where one is wanted."""
    teachers: list[torch.Tensor]
    """Logits divided by the temperature, [C, L] each; 0 in the rows of a teacher without weight."""
    weights_CN: torch.Tensor
    target_CL: torch.Tensor
    """Log-probabilities of the ensemble."""

    @classmethod
    def of(cls, rows: LogitRows, spec: LossSpec, vocab: VocabShard, *, wants_gradient: bool) -> _Compared:
        vocab = replace(vocab, stop=vocab.start + max(rows.width, 1))
        weights_CN = rows.weights_RN.double()
        teachers = [
            (_columns(rows, z) / spec.temperature).masked_fill(weights_CN[:, n, None] == 0, 0.0)
            for n, z in enumerate(rows.teachers)
        ]
        if spec.is_probs:
            logps = [vocab.log_softmax(z_CL) for z_CL in teachers]
            target_CL = ensemble.mean_probs(logps, weights_CN)
        else:
            target_CL = ensemble.mean_logits(teachers, weights_CN, vocab)
        student_CL = _columns(rows, rows.student_RL).requires_grad_(wants_gradient)
        return cls(spec, vocab, student_CL, teachers, weights_CN, target_CL)

    def is_bad(self) -> torch.Tensor:
        """Whether logits are NaN or infinite, as `TokenResults.is_bad_R` says, [C] bool on every shard."""
        bad_C = ~self._are_real(self.student_CL.detach()).all(-1)
        for z_CL in self.teachers:
            finite_CL = self._are_real(z_CL)
            if self.spec.is_probs:
                finite_CL = finite_CL | (z_CL == -math.inf)
            bad_C = bad_C | ~finite_CL.all(-1)
        return self.vocab.all_reduce(bad_C.double(), dist.ReduceOp.MAX) > 0

    def _are_real(self, z_CL: torch.Tensor) -> torch.Tensor:
        return self.vocab.fill_padding(z_CL, 0.0).isfinite()

    def reverse_kl_to_each(self, student_CL: torch.Tensor) -> torch.Tensor:
        """KL(student || teacher), NaN where a teacher has no weight, [C, N]."""
        kls = [reverse_kl(student_CL, self.vocab.log_softmax(z_CL), self.vocab) for z_CL in self.teachers]
        return torch.stack(kls, dim=-1).masked_fill(self.weights_CN == 0, math.nan)

    def sampled(self, student_CL: torch.Tensor, ids_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of the sampled tokens: student, target, student at the sampling temperature."""
        sampler_CL = student_CL
        if self.spec.sampler_ratio:
            sampler_CL = self.vocab.log_softmax(self.student_CL.detach(), self.spec.sampling_temperature)
        found = [self.vocab.gather(x_CL, ids_C[:, None])[:, 0] for x_CL in (student_CL, self.target_CL, sampler_CL)]
        return found[0], found[1], found[2]


def _columns(rows: LogitRows, logits: torch.Tensor) -> torch.Tensor:
    """The real columns of the rows in float64; a column of padding on a shard that has no real one."""
    chosen_CL = rows.chosen(logits).double()
    return chosen_CL if rows.width else chosen_CL.new_zeros(len(chosen_CL), 1)
