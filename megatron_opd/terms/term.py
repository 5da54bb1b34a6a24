"""What a term of the loss gives. Shape suffixes: T response tokens of a micro-batch, M metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Term:
    """A term at the tokens of a micro-batch."""

    loss: torch.Tensor
    """The sum over tokens, float32, with its gradient."""
    loss_T: torch.Tensor
    """By token, float64, without."""
    metrics_M2: torch.Tensor
    """float64; of each metric the sum over tokens, and the number of tokens summed."""


class WithGradient(torch.autograd.Function):
    """A scalar whose gradient is already known: backward multiplies it by the upstream scalar."""

    @staticmethod
    def forward(ctx: Any, logits_TL: torch.Tensor, loss: torch.Tensor, grad_TL: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(grad_TL)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_TL,) = ctx.saved_tensors
        return grad_TL * upstream.to(grad_TL.dtype), None, None


def sums(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """[M, 2] float64 of M metrics, each given over the tokens that it has."""
    return torch.stack([torch.stack([c.detach().double().sum(), c.new_tensor(len(c)).double()]) for c in columns])
