"""Runs passes over all tokens: materialised logits at once, hidden states and heads a chunk of tokens at a time.

A chunk's logits are one matrix product a model, into buffers that all chunks share; the pass replaces the student's by
the gradient, and two more products turn that into gradients of hidden states and head. Nothing is computed twice, and
nothing of a chunk survives it. Under tensor parallelism there are two sets of buffers: while one chunk's statistics
travel, the next one's products run, and while its sums travel, the next one's statistics are made.

A teacher's head may be one that makes its product itself (`OwnHead`: FP8); the student's, which has gradients, is a
tensor. Sums into a head's gradient are in that gradient's own type.

Shape suffixes: T tokens, R tokens that count, C tokens of a chunk, L local columns, D hidden size, N teachers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from megatron_opd.core.scores import Head
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.fused.backend import Backend, RowsPass
from megatron_opd.loss.fused.passes import Known, PassInputs
from megatron_opd.loss.fused.statistics import LogitRows, LossSpec
from megatron_opd.loss.fused.token_results import TokenResults

_BUFFER_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""Memory for the chunks' logits; larger products run better, up to a point that these are past."""


@dataclass(frozen=True, slots=True)
class FactoredLogits:
    """Logits that are not there yet: hidden states times an output head."""

    hidden_TD: torch.Tensor
    head_LD: Head
    """A tensor, where there are gradients."""
    upstream: float = 1.0
    """The factor by which backward will be called, the loss scale of fp16: gradients are made for it, for those that
    are rounded would lose small values before it came, and those that are summed elsewhere would never see it."""


Logits: TypeAlias = torch.Tensor | FactoredLogits


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything that a run over the tokens needs."""

    student: Logits
    teachers: tuple[Logits | None, ...]
    """None: one that has no weight at any token."""
    weights_RN: torch.Tensor
    asked: LossSpec
    vocab: VocabShard
    backend: Backend
    keep_R: torch.Tensor | None = None
    """The tokens that count; None: all. With some left out, student and teachers must be of one form."""
    ids_R: torch.Tensor | None = None
    """Sampled tokens, for metrics about them."""
    scale_R: torch.Tensor | None = None
    """float64 factor of every token's gradient; None: no gradient."""
    chunk_tokens: int = 0
    """Tokens at a time where there are matrix products; 0: as many as suit the buffers."""

    @property
    def width(self) -> int:
        """Real columns of this shard."""
        return min(max(self.vocab.size - self.vocab.start, 0), self.vocab.stop - self.vocab.start)


@dataclass(slots=True)
class Gradients:
    """Where gradients of a student's hidden states and head go; None: not wanted. The head's is added to."""

    hidden_TD: torch.Tensor | None
    head_LD: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Result:
    """The results, and the findings that a later gradient needs."""

    outcome: TokenResults
    known: list[Known | None]


def run(problem: Problem, gradients: Gradients | None = None, known: list[Known | None] | None = None) -> Result:
    """Loss and metrics of the tokens that count; with `scale_R` the gradient overwrites materialised student logits, or
    goes into `gradients`. With what an earlier run has `known`, only that gradient is made, without any exchange."""
    if all(not isinstance(x, FactoredLogits) for x in (problem.student, *problem.teachers)):
        whole = _pass(problem, slice(None), _rows_of_logits(problem), problem.asked, known and known[0])
        whole.start()
        whole.middle()
        return Result(whole.finish(), [whole.known()])
    return _Chunks(problem, gradients, known).run()


def _pass(problem: Problem, at: slice, rows: LogitRows, asked: LossSpec, known: Known | None) -> RowsPass:
    ids_C = None if problem.ids_R is None else problem.ids_R[at]
    scale_C = None if problem.scale_R is None else problem.scale_R[at]
    return problem.backend.begin(PassInputs(rows, asked, problem.vocab, scale_C, ids_C, known))


def _rows_of_logits(problem: Problem) -> LogitRows:
    student = problem.student
    assert isinstance(student, torch.Tensor)
    teachers = tuple(t if isinstance(t, torch.Tensor) else student for t in problem.teachers)
    return LogitRows(student, teachers, problem.weights_RN, problem.width, problem.keep_R)


class _Chunks:
    """One run over tokens with matrix products."""

    def __init__(self, problem: Problem, gradients: Gradients | None, known: list[Known | None] | None) -> None:
        self.problem, self.gradients, self.known = problem, gradients, known
        self.overlaps = problem.vocab.group is not None
        asked = problem.asked
        is_each_needed = asked.by_teacher or asked.ensemble != "logits" or asked.num_teachers == 1
        self.is_summed = not is_each_needed and self._can_sum()
        self.num_tokens = problem.weights_RN.shape[0]
        self.size = min(problem.chunk_tokens or self._suitable_size(), self.num_tokens)
        chunk_of_R = torch.arange(self.num_tokens, device=problem.weights_RN.device) // self.size
        asked_XN = torch.zeros(-(-self.num_tokens // self.size), len(problem.teachers), device=chunk_of_R.device)
        self.asked_XN = asked_XN.index_add_(0, chunk_of_R, (problem.weights_RN > 0).to(asked_XN.dtype)).tolist()
        self.buffers: dict[tuple[int, int], torch.Tensor] = {}

    def run(self) -> Result:
        outcomes: list[TokenResults] = []
        seen: list[Known | None] = []
        running: tuple[slice, RowsPass] | None = None
        for at in self._ranges():
            if running is not None and not self.overlaps:
                outcomes.append(self._end(*running))
            ahead = self._begin(at)
            if running is not None:
                running[1].middle()
            ahead.start()
            if running is not None and self.overlaps:
                outcomes.append(self._end(*running))
            seen += [] if running is None else [running[1].known()]
            running = at, ahead
        assert running is not None, "there is at least one token"
        outcomes.append(self._end(*running))
        return Result(TokenResults.joined(outcomes), [*seen, running[1].known()])

    def _ranges(self) -> Iterator[slice]:
        for start in range(0, self.num_tokens, self.size):
            yield slice(start, min(start + self.size, self.num_tokens))

    def _begin(self, at: slice) -> RowsPass:
        """The chunk's logits, and its pass over them, not yet started."""
        problem, number = self.problem, at.start // self.size
        student_CL = self._project(problem.student, at, number, 0)
        asked, weights_CN = problem.asked, problem.weights_RN[at]
        if self.is_summed:
            teachers = (self._mean_logits(at, number),)
            asked, weights_CN = replace(asked, num_teachers=1), weights_CN.new_ones(len(weights_CN), 1)
        else:
            teachers = tuple(
                student_CL if t is None or not self.asked_XN[number][n] else self._project(t, at, number, n + 1)
                for n, t in enumerate(problem.teachers)
            )
        rows = LogitRows(student_CL, teachers, weights_CN.contiguous(), problem.width)
        return _pass(problem, at, rows, asked, self.known and self.known[number])

    def _end(self, at: slice, running: RowsPass) -> TokenResults:
        """The chunk's gradient, and what follows from it."""
        running.middle()
        found = running.finish()
        if (
            self.problem.scale_R is not None
            and isinstance(self.problem.student, FactoredLogits)
            and self.gradients is not None
        ):
            self._add_gradients(running.rows.student_RL, self.problem.student, at, self.gradients)
        return found

    def _add_gradients(self, grad_CL: torch.Tensor, student: FactoredLogits, at: slice, into: Gradients) -> None:
        keep_R = self.problem.keep_R
        if into.hidden_TD is not None and keep_R is None:
            torch.mm(grad_CL, student.head_LD, out=into.hidden_TD[at])
        elif into.hidden_TD is not None:
            made_CD = into.hidden_TD.new_empty(len(grad_CL), into.hidden_TD.shape[1])
            into.hidden_TD[keep_R[at]] = torch.mm(grad_CL, student.head_LD, out=made_CD)
        if into.head_LD is not None:
            add_head_gradient(grad_CL, self._hidden(student, at), into.head_LD)

    def _hidden(self, source: FactoredLogits, at: slice) -> torch.Tensor:
        keep_R = self.problem.keep_R
        return source.hidden_TD[at] if keep_R is None else source.hidden_TD[keep_R[at]]

    def _project(self, source: Logits, at: slice, number: int, which: int) -> torch.Tensor:
        if isinstance(source, torch.Tensor):
            assert self.problem.keep_R is None, "tokens are left out of one form only"
            return source[at]
        return logits(self._hidden(source, at), source.head_LD, self._buffer(source, at, number, which))

    def _mean_logits(self, at: slice, number: int) -> torch.Tensor:
        """Σ w_n h_n W_nᵀ as one product after the other into one buffer."""
        out_CL = None
        for n, teacher in enumerate(self.problem.teachers):
            if not isinstance(teacher, FactoredLogits) or not self.asked_XN[number][n]:
                continue
            w_C1 = self.problem.weights_RN[at, n, None].to(teacher.hidden_TD.dtype)
            weighted_CD = (self._hidden(teacher, at) * w_C1).masked_fill(w_C1 == 0, 0.0)
            if out_CL is None:
                out_CL = logits(weighted_CD, teacher.head_LD, self._buffer(teacher, at, number, 1))
            else:
                width = min(out_CL.shape[1], teacher.head_LD.shape[0])
                out_CL[:, :width].addmm_(weighted_CD, teacher.head_LD[:width].T)
        assert out_CL is not None, "weights sum to 1 at every token"
        return out_CL

    def _buffer(self, source: FactoredLogits, at: slice, number: int, which: int) -> torch.Tensor:
        """Memory for a chunk's logits; that of the chunk before is still in use where exchanges overlap."""
        key = (number % 2 if self.overlaps else 0), which
        if key not in self.buffers:
            columns = source.head_LD.shape[0]
            stride = room_of_row(columns, source.hidden_TD.device.type)
            self.buffers[key] = source.hidden_TD.new_empty(self.size, stride)[:, :columns]
        return self.buffers[key][: at.stop - at.start]

    def _can_sum(self) -> bool:
        """Whether teachers' logits can be added up by the matrix products: the type loses nothing."""
        teachers = [t for t in self.problem.teachers if t is not None]
        dtypes = {t.hidden_TD.dtype for t in teachers if isinstance(t, FactoredLogits)}
        widths = {t.head_LD.shape[0] for t in teachers if isinstance(t, FactoredLogits)}
        wide = len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64}
        only_linear = all(isinstance(t, FactoredLogits) and isinstance(t.head_LD, torch.Tensor) for t in teachers)
        return wide and only_linear and len(widths) == 1

    def _suitable_size(self) -> int:
        problem = self.problem
        models = [problem.student, *(problem.teachers[:1] if self.is_summed else problem.teachers)]
        row = sum(m.head_LD.shape[0] * m.hidden_TD.element_size() for m in models if isinstance(m, FactoredLogits))
        budget = _BUFFER_BYTES.get(problem.weights_RN.device.type, _BUFFER_BYTES["cpu"])
        return max(budget // (row * (2 if self.overlaps else 1)) // 16 * 16, 16)


def room_of_row(columns: int, device: str) -> int:
    """Values from one row of logits to the next. On a GPU a multiple of 16, whatever the vocabulary's size, or values
    would be loaded one by one."""
    return -(-columns // 16) * 16 if device == "cuda" else columns


def logits(hidden_CD: torch.Tensor, head_LD: Head, out_CL: torch.Tensor) -> torch.Tensor:
    """out = h Wᵀ, in the type of the three."""
    if not isinstance(head_LD, torch.Tensor):
        return head_LD.logits(hidden_CD, out_CL)
    return torch.mm(hidden_CD, head_LD.T, out=out_CL)


def add_head_gradient(grad_CL: torch.Tensor, hidden_CD: torch.Tensor, into_LD: torch.Tensor) -> None:
    """into += gᵀ h, summed in the type of `into`, float32 as a rule, whatever the others are."""
    if grad_CL.dtype == into_LD.dtype:
        into_LD.addmm_(grad_CL.T, hidden_CD)
    elif into_LD.is_cuda:
        torch.addmm(into_LD, grad_CL.T, hidden_CD, out_dtype=into_LD.dtype, out=into_LD)
    else:
        into_LD.addmm_(grad_CL.T.to(into_LD.dtype), hidden_CD.to(into_LD.dtype))
