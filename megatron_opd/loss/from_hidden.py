"""The distillation of teachers that tell hidden states: the function behind `distillation_loss`, on a micro-batch.

The student is its hidden states and head, or its logits. Models' logits exist for `loss.chunk_tokens` tokens at a time;
the gradient takes the place of the student's, and of hidden states goes on to those and to the head.
Shape suffixes: T response tokens of a micro-batch, L local vocabulary columns, D hidden size, N teachers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_opd.core.scores import Head, TeacherScore
from megatron_opd.core.types import MicroBatch
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.fused import FactoredLogits, Logits, LossSpec, Problem, WeightedSum, backends, loss_of
from megatron_opd.loss.metrics import Compared


def exact_loss(
    spec: LossSpec,
    vocab: VocabShard,
    heads: Sequence[Head | None],
    batch: MicroBatch,
    student: Logits,
    *,
    chunk_tokens: int,
    backend: str,
) -> tuple[torch.Tensor, Compared]:
    """(sum of the loss with its gradient, what is known of each token, float64).

    `backend` is a name of `backends.NAMES`. `student` is logits [T, L], or hidden states [T, D] and head [L, D]. With
    gradients on, logits hold the gradient afterwards, unless they are a leaf; the gradient of a head that has a
    `main_grad` is in there when this returns, and autograd gets none. Where logits are not finite, loss and gradient
    are NaN.
    """
    teachers = tuple(_factored(score, head) for score, head in zip(batch.teachers, heads, strict=True))
    first = student.hidden_TD if isinstance(student, FactoredLogits) else student
    problem = Problem(
        student=student,
        teachers=teachers,
        weights_RN=batch.weights_TN.contiguous(),
        asked=spec,
        vocab=vocab,
        backend=backends.choose([first, *(t.hidden_TD for t in teachers if t is not None)], backend, spec),
        ids_R=batch.targets_T,
        chunk_tokens=chunk_tokens,
    )
    weight_T = batch.weight("distill")
    loss, found = loss_of(problem, WeightedSum(weight_T))
    assert found.teachers_RN is not None
    asked_TN = batch.weights_TN > 0
    by_teacher = [found.teachers_RN[asked_TN[:, n], n] for n in range(len(teachers))]
    loss_T = found.loss_R * weight_T.double()
    return loss, Compared(loss_T, found.reverse_kl_R, by_teacher, *found.sampled())


def _factored(score: TeacherScore | None, head_LD: Head | None) -> FactoredLogits | None:
    """A teacher's hidden states and head; None for one that was asked about no token."""
    hidden_TD = None if score is None else score.hidden()
    if hidden_TD is None:
        return None
    assert head_LD is not None, "a teacher tells hidden states, but its output head is not here"
    return FactoredLogits(hidden_TD.to(head_LD.dtype), head_LD)
