"""The objective where every teacher tells hidden states: the fused loss, chunk by chunk of tokens.

The student is its hidden states and head, or its logits. Models' logits exist for `loss.chunk_tokens` tokens at a time;
the gradient takes the place of the student's, and of hidden states goes on to those and to the head.
Shape suffixes: T response tokens of a micro-batch, L local vocabulary columns, D hidden size, N teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_opd.config import LossConfig
from megatron_opd.core.types import Head, Hidden, MicroBatch
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.fused import FactoredLogits, Gradients, Logits, LossSpec, Problem, backends, run
from megatron_opd.loss.fused.reference import Reference


@dataclass(frozen=True, slots=True)
class _Known:
    """Gradients that were made together with the value."""

    backend: Reference
    of: tuple[torch.Tensor | None, ...]
    """By input of the graph, for the upstream factor; None: autograd gets none."""
    dtypes: tuple[torch.dtype, ...]
    has_added: bool
    """Whether the head's was added to its `main_grad`, for that factor, already."""
    upstream: float = 1.0
    """The factor that they were made for."""


class _WithGradient(torch.autograd.Function):
    """A value whose gradients are already known; backward scales them in place, so it can be called once."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, known: _Known, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.known = known
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        known, ctx.known = ctx.known, None
        if known.has_added:
            is_expected = (upstream == known.upstream).all()
            torch._assert_async(is_expected, "main_grad was added to for another upstream factor")
        upstream = upstream / known.upstream
        scaled = [None if grad is None else known.backend.scale(grad, upstream) for grad in known.of]
        return None, None, *(g if g is None else g.to(dtype) for g, dtype in zip(scaled, known.dtypes, strict=True))


def exact_loss(
    config: LossConfig,
    sampling_temperature: float,
    vocab: VocabShard,
    heads: Sequence[Head | None],
    batch: MicroBatch,
    student: Logits,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(sum of the loss with its gradient, the metrics by token each over the tokens that it has, float64).

    In the order of `Objective.metric_names`. `student` is logits [T, L], or hidden states [T, D] and head [L, D]. With
    gradients on, logits hold the gradient afterwards, unless they are a leaf; the gradient of a head that has a
    `main_grad` is in there when this returns, and autograd gets none. Where logits are not finite, loss and gradient
    are NaN.
    """
    wants_gradient = torch.is_grad_enabled()
    values = _detached(student, copies=wants_gradient)
    teachers = tuple(_linear(score, head) for score, head in zip(batch.teachers, heads, strict=True))
    first = values.hidden_TD if isinstance(values, FactoredLogits) else values
    share_T = batch.distill_T.double()
    upstream = student.upstream if isinstance(student, FactoredLogits) else 1.0
    problem = Problem(
        student=values,
        teachers=teachers,
        weights_RN=batch.weights_TN.contiguous(),
        asked=LossSpec(
            config.beta, config.temperature, config.ensemble, len(teachers),
            by_teacher=True, sampling_temperature=sampling_temperature,
        ),
        vocab=vocab,
        backend=backends.choose([first, *(t.hidden_TD for t in teachers if t is not None)]),
        ids_R=batch.targets_T,
        scale_R=share_T * upstream if wants_gradient else None,
        chunk_tokens=config.chunk_tokens,
    )  # fmt: skip
    gradients = _room(student) if wants_gradient and isinstance(student, FactoredLogits) else None
    found = run(problem, gradients).outcome
    student_T, target_T, sampler_T = found.sampled()
    assert found.teachers_RN is not None
    loss_T = found.loss_R * share_T
    loss = loss_T.sum().float()
    if wants_gradient:
        loss = _with_gradient(loss, problem, student, gradients)
    asked_TN = batch.weights_TN > 0
    by_teacher = [found.teachers_RN[asked_TN[:, n], n] for n in range(len(teachers))]
    lag_T = (sampler_T - batch.behaviour_logp_T)[batch.on_policy_T]
    columns = [loss_T, found.reverse_kl_R, *by_teacher, student_T, target_T]
    return loss, [*columns, lag_T.exp() - 1 - lag_T]


def _detached(student: Logits, *, copies: bool) -> Logits:
    """The student outside the graph; logits that are a leaf as a copy, where `copies`."""
    if isinstance(student, FactoredLogits):
        return FactoredLogits(student.hidden_TD.detach(), student.head_LD.detach())
    return student.detach().clone() if copies and student.is_leaf else student.detach()


def _room(student: FactoredLogits) -> Gradients:
    """Memory for the gradients: the head's in float32 at least, where Megatron sums it if that is known."""
    head_LD = student.head_LD
    if not head_LD.requires_grad:  # adapters learn, the head does not
        return Gradients(torch.empty_like(student.hidden_TD), None)
    into_LD = getattr(head_LD, "main_grad", None)
    if into_LD is None:
        wide = torch.promote_types(head_LD.dtype, torch.float32)
        into_LD = torch.zeros(head_LD.shape, dtype=wide, device=head_LD.device)
    return Gradients(torch.empty_like(student.hidden_TD), into_LD)


def _with_gradient(loss: torch.Tensor, problem: Problem, student: Logits, gradients: Gradients | None) -> torch.Tensor:
    """The loss as a node of the graph."""
    if isinstance(student, FactoredLogits):
        assert gradients is not None
        has_added = student.head_LD.requires_grad and hasattr(student.head_LD, "main_grad")
        of = gradients.hidden_TD, None if has_added else gradients.head_LD
        inputs = student.hidden_TD, student.head_LD
    else:
        assert isinstance(problem.student, torch.Tensor)
        torch.autograd.graph.increment_version(problem.student)  # compiled kernels write behind autograd's back
        has_added, of, inputs = False, (problem.student,), (student,)
    upstream = student.upstream if isinstance(student, FactoredLogits) else 1.0
    known = _Known(problem.backend, of, tuple(x.dtype for x in inputs), has_added, upstream)
    return _WithGradient.apply(loss, known, *inputs)


def _linear(score: Any, head_LD: Head | None) -> FactoredLogits | None:
    """A teacher's hidden states and head; None for one that was asked about no token."""
    if not isinstance(score, Hidden) or score.hidden_RD is None:
        return None
    assert head_LD is not None, "a teacher tells hidden states, but its output head is not here"
    return FactoredLogits(score.hidden_RD.to(head_LD.dtype), head_LD)
