"""The one autograd function of the losses: a value whose gradients were made with it, outside the graph.

Everything else (chunks of tokens, `main_grad`, the factor that backward brings) is in plain code that runs before the
value is put into the graph (`fused/differentiable.py`), or in the function that is called when backward arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

Backward: TypeAlias = Callable[[torch.Tensor], Sequence[torch.Tensor | None]]
"""From the upstream factor to the gradients of the inputs, in order; None for an input that gets none."""


class _Node(torch.autograd.Function):
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


def with_gradient(loss: torch.Tensor, logits_TL: torch.Tensor, grad_TL: torch.Tensor) -> torch.Tensor:
    """A scalar loss whose gradient with respect to the logits is already known."""
    return in_graph(loss, lambda upstream: (grad_TL * upstream.to(grad_TL.dtype),), logits_TL)
