"""The objective where every teacher tells hidden states: the fused loss on the student's logits, chunk by chunk.

Teachers' logits exist for `loss.chunk_tokens` tokens at a time; the gradient takes the place of the student's logits.
Shape suffixes: T response tokens of a micro-batch, L local vocabulary columns, N teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_opd.config import LossConfig
from megatron_opd.fused import Asked, Linear, Problem, backends, run
from megatron_opd.fused.reference import Reference
from megatron_opd.types import Hidden, MicroBatch
from megatron_opd.vocab import VocabShard


class _WithGradient(torch.autograd.Function):
    """A value whose gradient is already known; backward scales that in place, so it can be called once."""

    @staticmethod
    def forward(
        ctx: Any, logits_TL: torch.Tensor, value: torch.Tensor, grad_TL: torch.Tensor, backend: Reference
    ) -> torch.Tensor:
        ctx.known = grad_TL, backend
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_TL, backend), ctx.known = ctx.known, None
        return backend.scale(grad_TL, upstream), None, None, None


def exact_loss(
    config: LossConfig,
    sampling_temperature: float,
    vocab: VocabShard,
    heads: Sequence[torch.Tensor | None],
    batch: MicroBatch,
    logits_TL: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(sum of the loss with its gradient, the metrics by token each over the tokens that it has, float64).

    In the order of `Objective.metric_names`. With gradients on, `logits_TL` hold the gradient afterwards, unless they
    are a leaf. Where logits are not finite, loss and gradient are NaN.
    """
    wants_gradient = torch.is_grad_enabled()
    student_TL = logits_TL.detach()
    if wants_gradient and logits_TL.is_leaf:
        student_TL = student_TL.clone()
    teachers = tuple(_linear(score, head) for score, head in zip(batch.teachers, heads, strict=True))
    if batch.distill_T is None:
        scale_T = torch.ones(len(student_TL), dtype=torch.float64, device=student_TL.device)
    else:
        scale_T = batch.distill_T.double()
    problem = Problem(
        student=student_TL,
        teachers=teachers,
        weights_RN=batch.weights_TN.contiguous(),
        asked=Asked(
            config.beta, config.temperature, config.ensemble, len(teachers),
            by_teacher=True, sampling_temperature=sampling_temperature,
        ),
        vocab=vocab,
        backend=backends.choose([student_TL, *(t.hidden_TD for t in teachers if t is not None)]),
        ids_R=batch.targets_T,
        scale_R=scale_T if wants_gradient else None,
        chunk_tokens=config.chunk_tokens,
    )  # fmt: skip
    found = run(problem).outcome
    student_T, target_T, sampler_T = found.sampled()
    assert found.teachers_RN is not None
    loss_T = found.loss_R if batch.distill_T is None else found.loss_R * scale_T
    loss = loss_T.sum().float()
    if wants_gradient:
        torch.autograd.graph.increment_version(student_TL)
        loss = _WithGradient.apply(logits_TL, loss, student_TL, problem.backend)
    asked_TN = batch.weights_TN > 0
    by_teacher = [found.teachers_RN[asked_TN[:, n], n] for n in range(len(teachers))]
    lag_T = sampler_T - batch.behaviour_logp_T
    if batch.on_policy_T is not None:
        lag_T = lag_T[batch.on_policy_T]
    columns = [loss_T, found.reverse_kl_R, *by_teacher, student_T, target_T]
    return loss, [*columns, lag_T.exp() - 1 - lag_T]


def _linear(score: Any, head_LD: torch.Tensor | None) -> Linear | None:
    """A teacher's hidden states and head; None for one that was asked about no token."""
    if not isinstance(score, Hidden) or score.hidden_RD is None:
        return None
    assert head_LD is not None, "a teacher tells hidden states, but its output head is not here"
    return Linear(score.hidden_RD.to(head_LD.dtype), head_LD)
