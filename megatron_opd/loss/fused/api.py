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
from typing import Literal, TypedDict, Unpack

import torch

from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.divergences import GKD
from megatron_opd.loss.fused import backends, validated
from megatron_opd.loss.fused.chunks import FactoredLogits, Logits, Problem
from megatron_opd.loss.fused.differentiable import ByToken, Mean, loss_of
from megatron_opd.loss.fused.statistics import LossSpec


class Settings(TypedDict, total=False):
    """Keyword arguments of both forms; all may be left out."""

    weights: torch.Tensor | Sequence[float] | None
    """Weights of the teachers: N numbers, or N for every token; they are scaled to sum to 1. A teacher with weight 0 at
    a token is not looked at there. None: equal."""
    mask: torch.Tensor | None
    """Nonzero: the token counts. The others cost nothing and have gradient 0. None: all count."""
    beta: float
    """0: forward KL(teachers||student); 1 (default): reverse KL(student||teachers); between: JSD(beta) as in GKD."""
    divergence: str
    """A name of `loss.divergences.DIVERGENCES`; default gkd, which `beta` is about. Others run by their formula."""
    temperature: float
    """Both sides' logits are divided by it. Default 1."""
    ensemble: Literal["logits", "probs"]
    """Average over teachers: of logits (default) or of probabilities."""
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
    backend: Literal["auto", "torch", "native", "triton", "readable"]
    """Backend that computes; auto (default) goes by device, type and divergence."""
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
    return _computed(flat[0], flat[1:], settings, student_logits.shape[:-1])


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
    student = FactoredLogits(_matrix(student_hidden), student_head, float(settings.get("upstream", 1.0)))
    models = [FactoredLogits(_matrix(h), w) for h, w in teachers]
    return _computed(student, models, settings, student_hidden.shape[:-1])


def _computed(student: Logits, teachers: Sequence[Logits], settings: Settings, shape: Sequence[int]) -> torch.Tensor:
    """The loss; by token in the given shape. Raises ValueError, TypeError, NonFiniteLogits."""
    problem = _problem(student, teachers, settings)
    is_mean = settings.get("reduction", "mean") == "mean"
    reduction = Mean() if is_mean else ByToken(validated.num_tokens(student), problem.keep_R)
    loss, found = loss_of(problem, reduction, keep_logits=settings.get("keep_logits", False))
    if settings.get("on_nonfinite", "raise") == "raise" and bool(found.is_bad_R.any()):
        bad_R = found.is_bad_R.nonzero()[:, 0]
        raise NonFiniteLogits((bad_R if problem.keep_R is None else problem.keep_R[bad_R]).tolist())
    return loss if is_mean else loss.view(*shape)


def _problem(student: Logits, teachers: Sequence[Logits], settings: Settings) -> Problem:
    """Everything checked. Raises ValueError, and TypeError for settings that there are not."""
    unknown = set(settings) - set(Settings.__annotations__)
    if unknown:
        raise TypeError(
            f"there is no setting {', '.join(sorted(unknown))}; there are {', '.join(Settings.__annotations__)}"
        )
    beta, temperature = float(settings.get("beta", 1.0)), float(settings.get("temperature", 1.0))
    ensemble, reduction = settings.get("ensemble", "logits"), settings.get("reduction", "mean")
    on_nonfinite = settings.get("on_nonfinite", "raise")
    spec = LossSpec(beta, temperature, ensemble, len(teachers), divergence=settings.get("divergence", GKD))
    validated.check_spec(spec)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', not '{reduction}'")
    if on_nonfinite not in ("raise", "nan"):
        raise ValueError(f"on_nonfinite must be 'raise' or 'nan', not '{on_nonfinite}'")
    vocab = validated.check_models(student, teachers, settings.get("vocab"))
    values = [x.hidden_TD if isinstance(x, FactoredLogits) else x for x in (student, *teachers)]
    keep_R = validated.kept_tokens(settings.get("mask"), values[0])
    weights_TN = validated.normalised_weights(settings.get("weights"), values[0], len(teachers))
    return Problem(
        student=student,
        teachers=tuple(teachers),
        weights_RN=validated.checked_rows(weights_TN, keep_R),
        asked=spec,
        vocab=vocab,
        backend=backends.choose(values, settings.get("backend", "auto"), spec),
        keep_R=keep_R,
        chunk_tokens=settings.get("chunk_tokens", 0),
    )


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """[..., C] as [T, C]; a view where that is possible. A column's values must lie next to each other."""
    if x.dim() < 2:
        raise ValueError(f"logits and hidden states need tokens and columns, not shape {tuple(x.shape)}")
    flat = x if x.dim() == 2 else x.flatten(0, -2)
    return flat if flat.stride(-1) == 1 or math.prod(flat.shape) == 0 else flat.contiguous()
