"""Checks of the loss's arguments before any work: ValueError with the argument's name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.divergences import DIVERGENCES
from megatron_opd.loss.fused.chunks import FactoredLogits, Logits
from megatron_opd.loss.fused.statistics import LossSpec

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_spec(spec: LossSpec) -> None:
    if not 0 <= spec.beta <= 1:
        raise ValueError(f"beta must lie between 0 (forward KL) and 1 (reverse KL), not {spec.beta}")
    if not spec.temperature > 0 or spec.temperature == float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, not {spec.temperature}")
    if spec.ensemble not in ("logits", "probs"):
        raise ValueError(f"ensemble must be 'logits' or 'probs', not '{spec.ensemble}'")
    if spec.divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(sorted(DIVERGENCES))}, not '{spec.divergence}'")


def check_models(student: Logits, teachers: Sequence[Logits], vocab: VocabShard | None) -> VocabShard:
    """The vocabulary's shard, after a look at all shapes, types and devices. Tensors are [T, L], [T, D] and [L, D]."""
    if not teachers:
        raise ValueError("teachers: at least one is needed")
    models = {"student": student, **{f"teacher {n}": teacher for n, teacher in enumerate(teachers)}}
    for name, model in models.items():
        _check_model(name, model)
        if num_tokens(model) != num_tokens(student):
            raise ValueError(f"{name} has {num_tokens(model)} tokens, but the student {num_tokens(student)}")
        if _device(model) != _device(student):
            raise ValueError(f"{name} is on {_device(model)}, but the student on {_device(student)}")
    widths = {name: num_columns(model) for name, model in models.items()}
    if vocab is None:
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"vocabularies differ ({', '.join(f'{n}: {w}' for n, w in widths.items())}): pass"
                " vocab=VocabShard(0, student's columns, number of entries that all have)"
            )
        return VocabShard.whole(widths["student"])
    if vocab.stop - vocab.start != widths["student"]:
        raise ValueError(f"vocab has columns {vocab.start} to {vocab.stop}, but the student has {widths['student']}")
    real = min(max(vocab.size - vocab.start, 0), vocab.stop - vocab.start)
    for name, width in widths.items():
        if width < real:
            raise ValueError(f"{name} has {width} columns, but {real} of this shard are real")
    return vocab


def normalised_weights(weights: object, student: torch.Tensor, num_teachers: int) -> torch.Tensor:
    """Ensemble weights by token [T, N]. None: equal; N numbers: the same for all tokens."""
    rows = student.shape[0]
    if weights is None:
        return torch.full((rows, num_teachers), 1 / num_teachers, device=student.device)
    given = torch.as_tensor(weights, device=student.device).detach().double()
    if given.shape[-1:] != (num_teachers,) or given.numel() not in (num_teachers, rows * num_teachers):
        raise ValueError(
            f"weights has shape {tuple(given.shape)}, but {num_teachers} numbers, or that many for each of {rows}"
            " tokens, are needed"
        )
    given = given.reshape(-1, num_teachers).expand(rows, -1)
    return given


def checked_rows(weights_RN: torch.Tensor, keep_R: torch.Tensor | None) -> torch.Tensor:
    """The weights of the tokens that count, raised or lowered to sum to 1."""
    chosen_RN = weights_RN if keep_R is None else weights_RN[keep_R]
    total_R1 = chosen_RN.sum(-1, keepdim=True)
    wrong_R = (chosen_RN < 0).any(-1) | ~chosen_RN.isfinite().all(-1) | ~(total_R1[:, 0] > 0)
    if bool(wrong_R.any()):
        row = int(wrong_R.nonzero()[0])
        token = row if keep_R is None else int(keep_R[row])
        raise ValueError(
            f"weights of token {token} are {chosen_RN[row].tolist()}: they must be finite, not negative, and not all 0"
        )
    return (chosen_RN / total_R1).float().contiguous()


def kept_tokens(mask: torch.Tensor | None, student: torch.Tensor) -> torch.Tensor | None:
    """Indices of the tokens that count; None: all."""
    if mask is None:
        return None
    if mask.numel() != student.shape[0]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, but there are {student.shape[0]} tokens")
    keep_R = (mask.reshape(-1) != 0).to(student.device).nonzero()[:, 0]
    if not len(keep_R):
        raise ValueError("mask: no token counts; leave this batch out")
    return None if len(keep_R) == student.shape[0] else keep_R


def num_tokens(model: Logits) -> int:
    return (model.hidden_TD if isinstance(model, FactoredLogits) else model).shape[0]


def num_columns(model: Logits) -> int:
    return model.head_LD.shape[0] if isinstance(model, FactoredLogits) else model.shape[1]


def _device(model: Logits) -> torch.device:
    return (model.hidden_TD if isinstance(model, FactoredLogits) else model).device


def _check_model(name: str, model: Logits) -> None:
    parts = (
        {"hidden states": model.hidden_TD, "head": model.head_LD}
        if isinstance(model, FactoredLogits)
        else {"logits": model}
    )
    for what, x in parts.items():
        if x.dtype not in DTYPES:
            raise ValueError(f"{what} of {name} must be floating-point, not {x.dtype}")
        if x.dim() != 2 or 0 in x.shape:
            raise ValueError(f"{what} of {name} must be a matrix with rows and columns, not {tuple(x.shape)}")
    if isinstance(model, FactoredLogits):
        if model.hidden_TD.shape[1] != model.head_LD.shape[1]:
            raise ValueError(
                f"hidden states of {name} have {model.hidden_TD.shape[1]} numbers, but its head"
                f" {model.head_LD.shape[1]}"
            )
        if (model.hidden_TD.dtype, model.hidden_TD.device) != (model.head_LD.dtype, model.head_LD.device):
            raise ValueError(
                f"hidden states of {name} are {model.hidden_TD.dtype} on {model.hidden_TD.device}, but its head"
                f" {model.head_LD.dtype} on {model.head_LD.device}"
            )
