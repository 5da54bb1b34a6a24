"""The distillation loss with its gradient: what `distillation_loss`, `linear_distillation_loss` and the training step
all call, so that they cannot differ.

The gradient is made together with the value and takes the place of the student's logits, or goes on to hidden states
and head, chunk by chunk. It is made for the factor by which backward will be called (`FactoredLogits.upstream`, the
loss scale of fp16), and the head's is added to the head's `main_grad`, where it has one, right away. Only a loss by
token is different for hidden states: its factors are known in the backward pass, which computes the logits again.

Shape suffixes: T tokens, R tokens that count, L local columns, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch

from megatron_opd.loss.fused.backend import Backend
from megatron_opd.loss.fused.chunks import FactoredLogits, Gradients, Logits, Problem, Result, run
from megatron_opd.loss.fused.token_results import TokenResults

Backward: TypeAlias = Callable[[torch.Tensor], Sequence[torch.Tensor | None]]
"""From the upstream factor to the gradients of the inputs, in order; None for an input that gets none."""


class _Node(torch.autograd.Function):
    """The one autograd function of the losses: a value whose gradients were made with it, outside the graph."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, backward: Backward, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.make_gradients = backward
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        make_gradients, ctx.make_gradients = ctx.make_gradients, None
        if make_gradients is None:
            raise RuntimeError("the loss gave its gradient away in the first backward pass; compute the loss again")
        return None, None, *make_gradients(upstream)


def in_graph(value: torch.Tensor, backward: Backward, *inputs: torch.Tensor) -> torch.Tensor:
    """`value` as a function of `inputs`, whose gradients `backward` gives, once."""
    return _Node.apply(value, backward, *inputs)


class Reduction(Protocol):
    """From the losses of the tokens that count to the value."""

    def value(self, loss_R: torch.Tensor) -> torch.Tensor:
        """Float32."""

    def factors(self, loss_like_R: torch.Tensor) -> torch.Tensor | None:
        """How much each token's loss counts in the value, [R] float64; None: the value is by token, so the backward
        pass brings the factors."""


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean over the tokens that count."""

    def value(self, loss_R: torch.Tensor) -> torch.Tensor:
        return loss_R.mean().float()

    def factors(self, loss_like_R: torch.Tensor) -> torch.Tensor | None:
        return torch.full_like(loss_like_R, 1 / len(loss_like_R))


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """The sum over tokens with a weight each, as the training step needs it."""

    weight_R: torch.Tensor

    def value(self, loss_R: torch.Tensor) -> torch.Tensor:
        return (loss_R * self.weight_R.double()).sum().float()

    def factors(self, loss_like_R: torch.Tensor) -> torch.Tensor | None:
        return self.weight_R.double()


@dataclass(frozen=True, slots=True)
class ByToken:
    """The loss of every one of T tokens, 0 at those that do not count."""

    num_tokens: int
    keep_R: torch.Tensor | None

    def value(self, loss_R: torch.Tensor) -> torch.Tensor:
        if self.keep_R is None:
            return loss_R.float()
        return loss_R.new_zeros(self.num_tokens).index_copy_(0, self.keep_R, loss_R).float()

    def factors(self, loss_like_R: torch.Tensor) -> torch.Tensor | None:
        return None


def loss_of(problem: Problem, reduction: Reduction, *, keep_logits: bool = False) -> tuple[torch.Tensor, TokenResults]:
    """(the value, in the graph where the student is; results by token without a gradient).

    The problem's student is attached to the graph; its `scale_R` is set here. Materialised logits of the student are
    overwritten by the gradient, unless they are a leaf or `keep_logits`. Logits that are not finite make loss and
    gradient NaN; the results say where.
    """
    inputs = _inputs(problem.student)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in inputs]
    with torch.no_grad():
        outside = replace(problem, student=_detached(problem.student), teachers=tuple(map(_detached, problem.teachers)))
        made = _on_hidden if isinstance(problem.student, FactoredLogits) else _on_logits
        found, backward = made(outside, problem.student, reduction, needs, keep_logits)
        value = reduction.value(found.loss_R)
    return (in_graph(value, backward, *inputs) if any(needs) else value), found


def _on_logits(
    problem: Problem, student: Logits, reduction: Reduction, needs: list[bool], keep_logits: bool
) -> tuple[TokenResults, Backward]:
    """`problem` is outside the graph, `student` in it."""
    student_TL = problem.student
    assert isinstance(student_TL, torch.Tensor)
    assert isinstance(student, torch.Tensor)
    if needs[0]:
        student_TL = student_TL.clone() if keep_logits or _belongs_to_leaf(student) else student_TL
        problem = replace(problem, student=student_TL, scale_R=_factors_or_ones(problem, reduction))
    found = run(problem).outcome
    if needs[0]:
        if problem.keep_R is not None:
            counts_T = torch.zeros(len(student_TL), dtype=torch.bool, device=student_TL.device)
            student_TL[~counts_T.index_fill_(0, problem.keep_R, True)] = 0
        torch.autograd.graph.increment_version(student_TL)  # compiled kernels write behind autograd's back
    scale = problem.backend.scale  # nothing else is kept: teachers' tensors are free when this returns
    return found, lambda upstream: (scale(student_TL, upstream),)


def _on_hidden(
    problem: Problem, student: Logits, reduction: Reduction, needs: list[bool], keep_logits: bool
) -> tuple[TokenResults, Backward]:
    """`problem` is outside the graph, `student` in it."""
    assert isinstance(student, FactoredLogits)
    factors_R = reduction.factors(_a_number_a_row(problem)) if any(needs) else None
    if factors_R is None:
        result = run(problem)
        return result.outcome, lambda upstream: _made_again(problem, student, needs, upstream, result)
    main_grad = getattr(student.head_LD, "main_grad", None) if needs[1] else None
    gradients = _room(student, needs, problem.keep_R, main_grad)
    found = run(replace(problem, scale_R=factors_R * student.upstream), gradients).outcome
    scaled = _Scaled(problem.backend, student.upstream, student.head_LD.dtype, main_grad is not None)
    return found, lambda upstream: scaled(gradients, upstream)


@dataclass(frozen=True, slots=True)
class _Scaled:
    """Gradients that were made for one upstream factor, for the one that came."""

    backend: Backend
    upstream: float
    head_dtype: torch.dtype
    has_added: bool
    """Whether the head's gradient is in its `main_grad` already; autograd then gets none."""

    def __call__(self, gradients: Gradients, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.has_added:
            is_expected = (upstream == self.upstream).all()
            torch._assert_async(is_expected, "main_grad was added to for another upstream factor")
        factor = upstream / self.upstream
        hidden_TD, head_LD = gradients.hidden_TD, None if self.has_added else gradients.head_LD
        hidden_TD = None if hidden_TD is None else self.backend.scale(hidden_TD, factor)
        head_LD = None if head_LD is None else self.backend.scale(head_LD, factor).to(self.head_dtype)
        return hidden_TD, head_LD


def _made_again(
    problem: Problem, student: FactoredLogits, needs: list[bool], upstream_T: torch.Tensor, result: Result
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients for factors by token, from the statistics that are known."""
    gradients, keep_R = _room(student, needs, problem.keep_R, None), problem.keep_R
    scale_R = (upstream_T if keep_R is None else upstream_T[keep_R]).double()
    run(replace(problem, scale_R=scale_R), gradients, result.known)
    head_LD = gradients.head_LD
    return gradients.hidden_TD, None if head_LD is None else head_LD.to(student.head_LD.dtype)


def _room(
    student: FactoredLogits, needs: list[bool], keep_R: torch.Tensor | None, main_grad: torch.Tensor | None
) -> Gradients:
    """Memory for the gradients that are needed: the head's in float32 at least, where Megatron sums it if that is
    known. Adapters learn while the head does not."""
    hidden_TD = head_LD = None
    if needs[0]:
        hidden_TD = (torch.empty_like if keep_R is None else torch.zeros_like)(student.hidden_TD.detach())
    if needs[1]:
        head_LD = main_grad
        if head_LD is None:
            wide = torch.promote_types(student.head_LD.dtype, torch.float32)
            head_LD = torch.zeros(student.head_LD.shape, dtype=wide, device=student.head_LD.device)
    return Gradients(hidden_TD, head_LD)


def _factors_or_ones(problem: Problem, reduction: Reduction) -> torch.Tensor:
    one_R = _a_number_a_row(problem)
    factors_R = reduction.factors(one_R)
    return one_R if factors_R is None else factors_R


def _a_number_a_row(problem: Problem) -> torch.Tensor:
    """Ones, [R] float64."""
    return problem.weights_RN.new_ones(len(problem.weights_RN), dtype=torch.float64)


def _inputs(student: Logits) -> tuple[torch.Tensor, ...]:
    if isinstance(student, FactoredLogits):
        return student.hidden_TD, student.head_LD
    return (student,)


def _detached(model: Logits | None) -> Logits | None:
    if isinstance(model, FactoredLogits):
        head_LD = model.head_LD.detach() if isinstance(model.head_LD, torch.Tensor) else model.head_LD
        return FactoredLogits(model.hidden_TD.detach(), head_LD)
    return None if model is None else model.detach()


def _belongs_to_leaf(x: torch.Tensor) -> bool:
    """Whether writing to it would change a leaf of the graph: it is one, or a view of one, as flattened logits are."""
    base = x._base
    return x.is_leaf or (base is not None and base.is_leaf)
