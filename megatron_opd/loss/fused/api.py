"""The distillation loss in two forms with one meaning: of materialised logits, and of hidden states and output heads.

    p = softmax(Σ w_n z_n / τ)            ensemble "logits", or Σ w_n softmax(z_n / τ), ensemble "probs"
    q = softmax(student's z / τ)
    loss = mean over the mask of  KL(p‖q) for beta 0,  KL(q‖p) for beta 1,  and between
           beta KL(p‖m) + (1 - beta) KL(q‖m),  m = beta p + (1 - beta) q

over the whole vocabulary, which may be sharded: one exchange for a KL to an average of logits, one more for JSD and for
averages of probabilities, and none in the backward pass. The gradient is made together with the value.

Shape suffixes: T tokens, R tokens that count, L local columns, D hidden size, N teachers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack

import torch

from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.fused import backends, validated
from megatron_opd.loss.fused.chunks import FactoredLogits, Gradients, Logits, Problem, Result, run
from megatron_opd.loss.fused.statistics import LossSpec


class Settings(TypedDict, total=False):
    """Keyword arguments of both forms; all may be left out."""

    weights: torch.Tensor | Sequence[float] | None
    """Of the teachers: N numbers, or N for every token; they are made to sum to 1. A teacher with weight 0 at a token
    is not looked at there. None: equal."""
    mask: torch.Tensor | None
    """Nonzero: the token counts. The others cost nothing and have gradient 0. None: all count."""
    beta: float
    """0: forward KL(teachers||student); 1 (default): reverse KL(student||teachers); between: JSD(beta) as in GKD."""
    temperature: float
    """Both sides' logits are divided by it. Default 1."""
    ensemble: Literal["logits", "probs"]
    """What is averaged over teachers. Default logits."""
    vocab: VocabShard | None
    """This rank's columns; None: the whole vocabulary is here, and all models have the same one."""
    reduction: Literal["mean", "none"]
    """mean (default): one number; none: the loss of every token [T], 0 where the mask is."""
    on_nonfinite: Literal["raise", "nan"]
    """NaN or infinity in the logits: raise NonFiniteLogits (default), or give NaN as the loss without waiting for the
    device to find out."""
    keep_logits: bool
    """Make the gradient in memory of its own. By default it overwrites the student's logits, unless they are a leaf of
    the graph: who reads them afterwards sees the gradient, and autograd refuses to."""
    backend: Literal["auto", "torch", "native", "triton"]
    """What does the work; auto (default) goes by device and type."""
    chunk_tokens: int
    """Hidden-state form: tokens whose logits exist at one time; 0 (default): as many as suit the device."""
    upstream: float
    """Hidden-state form with `main_grad`: the factor by which backward will be called. Default 1."""


class NonFiniteLogits(FloatingPointError):
    """NaN or infinity in the logits of a token that counts; `tokens` has the positions of all of them."""

    def __init__(self, tokens: list[int]) -> None:
        more = f" and {len(tokens) - 8} more" if len(tokens) > 8 else ""
        super().__init__(f"logits are NaN or infinite at token {', '.join(map(str, tokens[:8]))}{more}")
        self.tokens = tokens


def distillation_loss(
    student_logits: torch.Tensor, teacher_logits: Sequence[torch.Tensor], **settings: Unpack[Settings]
) -> torch.Tensor:
    """The loss of vocab-parallel logits: student [..., L], N teachers [..., L_n]; a float32 scalar, or [...] by token.

    `settings` are those of `Settings`. Where gradients are on, the student's logits are overwritten (see
    `keep_logits`); nothing else of their size is made. Under tensor parallelism every rank has the same value, and the
    gradient of its own columns. Raises ValueError for wrong arguments, NonFiniteLogits for wrong logits.
    """
    flat = [_matrix(x) for x in (student_logits, *teacher_logits)]
    problem, how = _problem(flat[0], flat[1:], settings)
    loss = _Loss.apply(_OfLogits(problem, how), flat[0])
    return loss if how.is_mean else loss.view(student_logits.shape[:-1])


def linear_distillation_loss(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teachers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    **settings: Unpack[Settings],
) -> torch.Tensor:
    """The loss of hidden states [..., D] and heads [L, D]; teachers are pairs of those; a scalar, or [...] by token.

    Equal to `distillation_loss` of their products, which exist for a chunk of tokens only. The head's gradient is
    summed in float32; where the head has a `main_grad`, it is added to that one right away, in the forward pass, for
    the given `upstream` factor, and autograd gets none for the head.

    The gradient of the hidden states is this shard's part, as a column-parallel layer's without its own reduction: the
    sum over shards is for what made them whole (Megatron's copy to, or gather from, the tensor-parallel region).
    With reduction "none" the backward pass computes the chunks' logits again, without any exchange.
    """
    student = FactoredLogits(_matrix(student_hidden), student_head)
    problem, how = _problem(student, [FactoredLogits(_matrix(h), w) for h, w in teachers], settings)
    loss = _Loss.apply(_OfHidden(problem, how), student.hidden_TD, student.head_LD)
    return loss if how.is_mean else loss.view(student_hidden.shape[:-1])


@dataclass(frozen=True, slots=True)
class _How:
    """What of the settings is not part of the problem."""

    num_tokens: int
    is_mean: bool
    raises: bool
    keep_logits: bool
    upstream: float

    def value(self, result: Result, keep_R: torch.Tensor | None) -> torch.Tensor:
        """The loss, float32. Raises NonFiniteLogits."""
        found = result.outcome
        if self.raises and bool(found.is_bad_R.any()):
            bad_R = found.is_bad_R.nonzero()[:, 0]
            raise NonFiniteLogits((bad_R if keep_R is None else keep_R[bad_R]).tolist())
        if self.is_mean:
            return found.loss_R.mean().float()
        if keep_R is None:
            return found.loss_R.float()
        return found.loss_R.new_zeros(self.num_tokens).index_copy_(0, keep_R, found.loss_R).float()


def _problem(student: Logits, teachers: Sequence[Logits], settings: Settings) -> tuple[Problem, _How]:
    """Everything checked. Raises ValueError, and TypeError for settings that there are not."""
    unknown = set(settings) - set(Settings.__annotations__)
    if unknown:
        raise TypeError(
            f"there is no setting {', '.join(sorted(unknown))}; there are {', '.join(Settings.__annotations__)}"
        )
    beta, temperature = float(settings.get("beta", 1.0)), float(settings.get("temperature", 1.0))
    ensemble, reduction = settings.get("ensemble", "logits"), settings.get("reduction", "mean")
    on_nonfinite = settings.get("on_nonfinite", "raise")
    validated.check_settings(beta, temperature, ensemble)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', not '{reduction}'")
    if on_nonfinite not in ("raise", "nan"):
        raise ValueError(f"on_nonfinite must be 'raise' or 'nan', not '{on_nonfinite}'")
    vocab = validated.check_models(student, teachers, settings.get("vocab"))
    values = [x.hidden_TD if isinstance(x, FactoredLogits) else x for x in (student, *teachers)]
    keep_R = validated.kept_tokens(settings.get("mask"), values[0])
    weights_TN = validated.normalised_weights(settings.get("weights"), values[0], len(teachers))
    problem = Problem(
        student=student,
        teachers=tuple(teachers),
        weights_RN=validated.checked_rows(weights_TN, keep_R),
        asked=LossSpec(beta, temperature, ensemble, len(teachers)),
        vocab=vocab,
        backend=backends.choose(values, settings.get("backend", "auto")),
        keep_R=keep_R,
        chunk_tokens=settings.get("chunk_tokens", 0),
    )
    keep_logits, upstream = settings.get("keep_logits", False), float(settings.get("upstream", 1.0))
    return problem, _How(len(values[0]), reduction == "mean", on_nonfinite == "raise", keep_logits, upstream)


class _Loss(torch.autograd.Function):
    """A value whose gradient is known, or nearly: what `_OfLogits` and `_OfHidden` say."""

    @staticmethod
    def forward(ctx: Any, of: _OfLogits | _OfHidden, *students: torch.Tensor) -> torch.Tensor:
        ctx.of = of
        return of.forward(list(ctx.needs_input_grad[1:]))

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of, ctx.of = ctx.of, None
        if of is None:
            raise RuntimeError("the loss gave its gradient away in the first backward pass; compute the loss again")
        return None, *of.backward(upstream)


class _OfLogits:
    """The loss of materialised logits."""

    def __init__(self, problem: Problem, how: _How) -> None:
        self.problem, self.how = problem, how
        self.grad_TL: torch.Tensor | None = None

    def forward(self, needs: list[bool]) -> torch.Tensor:
        problem = self.problem
        assert isinstance(problem.student, torch.Tensor)
        student_TL = problem.student.detach()
        if needs[0]:
            if self.how.keep_logits or _belongs_to_leaf(problem.student):
                student_TL = student_TL.clone()
            self.grad_TL = student_TL
            problem = replace(problem, scale_R=_scale(problem, self.how))
        problem = replace(problem, student=student_TL, teachers=tuple(_detached(t) for t in problem.teachers))
        result = run(problem)
        if needs[0]:
            if problem.keep_R is not None:
                counts_T = torch.zeros(len(student_TL), dtype=torch.bool, device=student_TL.device)
                student_TL[~counts_T.index_fill_(0, problem.keep_R, True)] = 0
            torch.autograd.graph.increment_version(student_TL)  # compiled kernels write behind autograd's back
        return self.how.value(result, problem.keep_R)

    def backward(self, upstream: torch.Tensor) -> tuple[torch.Tensor | None]:
        assert self.grad_TL is not None
        return (self.problem.backend.scale(self.grad_TL, upstream),)


class _OfHidden:
    """The loss of hidden states and heads."""

    def __init__(self, problem: Problem, how: _How) -> None:
        self.problem, self.how = problem, how
        student = problem.student
        assert isinstance(student, FactoredLogits)
        self.head = student.head_LD
        self.main_grad: torch.Tensor | None = getattr(student.head_LD, "main_grad", None) if how.is_mean else None
        self.problem = replace(
            problem,
            student=FactoredLogits(student.hidden_TD.detach(), student.head_LD.detach()),
            teachers=tuple(_detached(t) for t in problem.teachers),
        )

    def forward(self, needs: list[bool]) -> torch.Tensor:
        self.needs = needs
        self.gradients, problem = None, self.problem
        if self.how.is_mean and any(needs):
            self.gradients = self._room()
            problem = replace(problem, scale_R=_scale(problem, self.how) * self.how.upstream)
        self.result = run(problem, self.gradients)
        return self.how.value(self.result, problem.keep_R)

    def backward(self, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        gradients, backend = self.gradients, self.problem.backend
        if gradients is None:
            gradients, keep_R = self._room(), self.problem.keep_R
            scale_R = (upstream if keep_R is None else upstream[keep_R]).double()
            run(replace(self.problem, scale_R=scale_R), gradients, self.result.known)
            factor = None
        else:
            factor = upstream / self.how.upstream
        hidden_TD, head_LD = gradients.hidden_TD, gradients.head_LD
        if factor is not None and hidden_TD is not None:
            hidden_TD = backend.scale(hidden_TD, factor)
        if self.main_grad is not None:
            if factor is not None:
                torch._assert_async((factor == 1).all(), "main_grad was added to for another upstream factor")
            return hidden_TD, None
        if factor is not None and head_LD is not None:
            head_LD = backend.scale(head_LD, factor)
        return hidden_TD, None if head_LD is None else head_LD.to(self.head.dtype)

    def _room(self) -> Gradients:
        student, keep_R = self.problem.student, self.problem.keep_R
        assert isinstance(student, FactoredLogits)
        hidden_TD = head_LD = None
        if self.needs[0]:
            hidden_TD = (torch.empty_like if keep_R is None else torch.zeros_like)(student.hidden_TD)
        if self.needs[1]:
            wide = torch.float64 if self.head.dtype == torch.float64 else torch.float32
            head_LD = self.main_grad
            if head_LD is None:
                head_LD = torch.zeros(self.head.shape, dtype=wide, device=self.head.device)
        return Gradients(hidden_TD, head_LD)


def _scale(problem: Problem, how: _How) -> torch.Tensor:
    """Factor of every token's gradient: that of the mean, or 1."""
    rows = problem.weights_RN.shape[0]
    return problem.weights_RN.new_full((rows,), 1 / rows if how.is_mean else 1.0, dtype=torch.float64)


def _detached(model: Logits | None) -> Logits | None:
    if isinstance(model, FactoredLogits):
        return FactoredLogits(model.hidden_TD.detach(), model.head_LD.detach())
    return None if model is None else model.detach()


def _belongs_to_leaf(x: torch.Tensor) -> bool:
    """Whether writing to it would change a leaf of the graph: it is one, or a view of one, as flattened logits are."""
    base = x._base
    return x.is_leaf or (base is not None and base.is_leaf)


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """[..., C] as [T, C]; a view where that is possible. A column's values must lie next to each other."""
    if x.dim() < 2:
        raise ValueError(f"logits and hidden states need tokens and columns, not shape {tuple(x.shape)}")
    flat = x if x.dim() == 2 else x.flatten(0, -2)
    return flat if flat.stride(-1) == 1 or math.prod(flat.shape) == 0 else flat.contiguous()
