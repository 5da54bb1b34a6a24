"""Packed sequences: what a model sees of a micro-batch that goes through it as one row without padding in between.

Outside of `student/` a micro-batch is [B, S]. Where it is packed (`MicroBatch.is_packed`), its sequences lie
behind each other in one row here, and Megatron is told where each one begins (its "thd" format), so that positions
start anew and attention stays within a sequence. What is left of the row is filled up with sequences of padding that
nothing looks at, none longer than the longest real one: rotary embeddings are made for its positions only.

Shape letters: B sequences, S padded length, P the row's length, T learnt tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_opd.core.types import MicroBatch


@dataclass
class Sequences(PackedSeqParams):
    """Megatron's description of a row, with the lengths in host memory too."""

    lengths: tuple[int, ...] = ()
    """Of all sequences of the row, padding included; they add up to P."""


def inputs(batch: MicroBatch, *, of_engine: bool = False) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Tokens and positions in the shape `MicroBatch.model_shape`, and what else the model is to be called with.

    `of_engine`: its layers are Transformer Engine's, whose kernels read on the GPU where sequences begin. Megatron's
    own rotary embeddings read it on the host, for queries and for keys of every layer, and would wait for the GPU.
    """
    if batch.is_packed:
        return _in_one_row(batch, torch.device("cpu") if not of_engine else batch.tokens_BS.device)
    size, length = batch.tokens_BS.shape
    return batch.tokens_BS, torch.arange(length, device=batch.tokens_BS.device).expand(size, length), {}


def _in_one_row(batch: MicroBatch, read_on: torch.device) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    device = batch.tokens_BS.device
    real = [row_S[:n] for row_S, n in zip(batch.tokens_BS, batch.lengths, strict=True)]
    tokens_P = F.pad(torch.cat(real), (0, batch.row_length - sum(batch.lengths)))
    lengths = _with_padding(batch.lengths, batch.row_length)
    positions_P = torch.cat([torch.arange(n, device=device) for n in lengths])
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=read_on)
    described = Sequences(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
    )
    return tokens_P[None], positions_P[None], {"packed_seq_params": described}


def rows(batch: MicroBatch) -> torch.Tensor:
    """`batch.predicted_at_T` in the flat output of a model that saw `inputs`, [T]."""
    return batch.predicted_at_T - _earlier(batch) if batch.is_packed else batch.predicted_at_T


def _earlier(batch: MicroBatch) -> torch.Tensor:
    """By how much each learnt token's sequence begins earlier in the row than with padding before it, [T]."""
    length = batch.tokens_BS.shape[1]
    starts = [0, *accumulate(batch.lengths)][:-1]
    earlier_B = torch.tensor([b * length - start for b, start in enumerate(starts)], device=batch.sequence_T.device)
    return earlier_B[batch.sequence_T]


def _with_padding(lengths: tuple[int, ...], row: int) -> tuple[int, ...]:
    """The lengths, and those of the sequences of padding behind them."""
    whole, rest = divmod(row - sum(lengths), max(lengths))
    return (*lengths, *[max(lengths)] * whole, *[rest] * (rest > 0))
