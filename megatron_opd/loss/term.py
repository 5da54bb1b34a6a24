"""The terms of the loss: one that compares the student with its teachers, and others on sampled tokens.

Shape suffixes: T learnt tokens of a micro-batch, C tokens of a chunk, L local vocabulary columns, N teachers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch

from megatron_opd.config import LossConfig, TeacherConfig
from megatron_opd.core.scores import Head
from megatron_opd.core.types import MicroBatch
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.fused import Logits, in_graph
from megatron_opd.loss.metrics import Columns, Sums, added, sums
from megatron_opd.tracking.headline import Headline


@dataclass(frozen=True, slots=True)
class TermResult:
    """A term at the tokens of a micro-batch."""

    loss: torch.Tensor
    """The sum over tokens, float32, with its gradient."""
    loss_T: torch.Tensor
    """By token, float64, without."""
    metrics: Sums
    """Metrics by the names of the term's `metric_names`, all or some of them."""


class TeacherTerm(Protocol):
    """The distance to the teachers, on this rank's shard of the vocabulary."""

    config: LossConfig
    sampling_temperature: float
    vocab: VocabShard
    teachers: tuple[TeacherConfig, ...]

    @property
    def heads(self) -> tuple[Head | None, ...]:
        """By teacher: this rank's rows of its output head, where there is one."""

    @property
    def takes_hidden(self) -> bool:
        """Whether a call may be given the student's hidden states and head in place of its logits."""

    def metric_names(self) -> list[str]:
        """Names of its metrics, in the order of tables; `loss` is one."""

    def headlines(self) -> list[Headline]:
        """Its metrics that people are to see at every step."""

    def __call__(self, batch: MicroBatch, student: Logits) -> TermResult:
        """The term at all tokens; with gradients on, logits may be overwritten."""

    def each_teachers_logp(self, batch: MicroBatch) -> torch.Tensor:
        """Each teacher's log-probabilities of what was sampled, [T, N] float32; 0 where it is not asked."""


class TokenTerm(Protocol):
    """A term that knows the student alone, at sampled tokens. Its weights are in the micro-batch, or a setting."""

    def metric_names(self) -> list[str]:
        """Names of its metrics, in the order of tables."""

    def headlines(self) -> list[Headline]:
        """Its metrics that people are to see at every step."""

    def __call__(self, batch: MicroBatch, rows: slice, student: StudentTokens) -> tuple[torch.Tensor | None, Columns]:
        """(the loss of a chunk of tokens [C], which autograd differentiates, or None for a term that only measures;
        the chunk's metrics)."""


@dataclass(frozen=True, slots=True)
class StudentTokens:
    """The student at a chunk of tokens; a distribution is computed once, whoever asks for it."""

    logits_CL: torch.Tensor
    ids_C: torch.Tensor
    """The sampled tokens."""
    vocab: VocabShard
    sampling_temperature: float
    made: dict[float, torch.Tensor] = field(default_factory=dict)
    """Log-probabilities by temperature."""

    def logp(self, temperature: float) -> torch.Tensor:
        """Log-probabilities, [C, L]."""
        if temperature not in self.made:
            # One term may only measure, without a gradient, what the next one learns from.
            with torch.set_grad_enabled(self.logits_CL.requires_grad):
                self.made[temperature] = self.vocab.log_softmax(self.logits_CL, temperature)
        return self.made[temperature]

    def sampled(self, temperature: float) -> torch.Tensor:
        """Log-probabilities of the sampled tokens, [C]."""
        return self.vocab.gather(self.logp(temperature), self.ids_C[:, None])[:, 0]


Chunk: TypeAlias = tuple[slice | torch.Tensor, torch.Tensor | None, torch.Tensor, Columns]
"""(the chunk's tokens in the micro-batch; the gradient of their loss with respect to their logits [C, L], None without
grad mode; their loss [C]; their metrics)."""


def of_chunks(logits_TL: torch.Tensor, chunks: Iterable[Chunk]) -> TermResult:
    """The term of chunks that are made as they are asked for, so that one is there at a time; each token is in one."""
    loss_T = torch.zeros(len(logits_TL), dtype=torch.float64, device=logits_TL.device)
    total = torch.zeros((), dtype=torch.float64, device=logits_TL.device)
    metrics: Sums = {}
    grad_TL = torch.empty_like(logits_TL) if torch.is_grad_enabled() else None
    for rows, grad_CL, loss_C, columns in chunks:
        loss_T[rows] = loss_C.detach().double()
        total = total + loss_C.detach().double().sum()
        metrics = added(metrics, sums(columns))
        if grad_TL is not None:
            grad_TL[rows] = grad_CL
    loss = total.float()
    if grad_TL is not None:
        loss = with_gradient(loss, logits_TL, grad_TL)
    return TermResult(loss, loss_T, metrics)


def with_gradient(loss: torch.Tensor, logits_TL: torch.Tensor, grad_TL: torch.Tensor) -> torch.Tensor:
    """A scalar loss whose gradient with respect to the logits is already known."""
    return in_graph(loss, lambda upstream: (grad_TL * upstream.to(grad_TL.dtype),), logits_TL)
