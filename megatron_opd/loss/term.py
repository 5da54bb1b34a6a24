"""What a term of the loss gives, and how it is put together from chunks of tokens.

Shape suffixes: T response tokens of a micro-batch, C tokens of a chunk, L local vocabulary columns, M metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from megatron_opd.loss.node import with_gradient


@dataclass(frozen=True, slots=True)
class Term:
    """A term at the tokens of a micro-batch."""

    loss: torch.Tensor
    """The sum over tokens, float32, with its gradient."""
    loss_T: torch.Tensor
    """By token, float64, without."""
    metrics_M2: torch.Tensor
    """float64; of each metric the sum over tokens, and the number of tokens summed."""


Chunk: TypeAlias = tuple[slice | torch.Tensor, torch.Tensor | None, Sequence[torch.Tensor]]
"""Which of a micro-batch's tokens; the gradient of their loss with respect to their logits [C, L], None without grad
mode; their metrics, each over the tokens that it has, of which the first is the loss [C]."""


def of_chunks(logits_TL: torch.Tensor, chunks: Iterable[Chunk], num_metrics: int) -> Term:
    """The term of chunks that are made as they are asked for, so that one is there at a time; each token is in one."""
    loss_T = torch.zeros(len(logits_TL), dtype=torch.float64, device=logits_TL.device)
    metrics_M2 = torch.zeros(num_metrics, 2, dtype=torch.float64, device=logits_TL.device)
    grad_TL = torch.empty_like(logits_TL) if torch.is_grad_enabled() else None
    for rows, grad_CL, columns in chunks:
        loss_T[rows] = columns[0].detach().double()
        metrics_M2 += sums(columns)
        if grad_TL is not None:
            grad_TL[rows] = grad_CL
    loss = metrics_M2[0, 0].float()
    if grad_TL is not None:
        loss = with_gradient(loss, logits_TL, grad_TL)
    return Term(loss, loss_T, metrics_M2)


def sums(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """[M, 2] float64 of M metrics, each given over the tokens that it has."""
    return torch.stack([torch.stack([c.detach().double().sum(), c.new_tensor(len(c)).double()]) for c in columns])
