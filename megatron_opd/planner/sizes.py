"""How many parameters of a model lie on a rank of a layout. Pure arithmetic on what config.json says.

The shapes are those of Megatron's layers as `models/weight_map.py` names them; tests hold the two against each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_opd.config import ParallelConfig
from megatron_opd.models.architecture import Architecture

_ALIGN = 64
"""Megatron's gradient buffer starts every parameter at a multiple of this, with the distributed optimizer."""
_BUCKET_ALIGN = 128
MATRICES = ("qkv", "projection", "fc1", "fc2")
"""Names of the parameters that adapters and FP8 are about."""


@dataclass(frozen=True, slots=True)
class SizedParameter:
    """Equal parameters of a rank."""

    name: str
    numel: int
    """Of one of them, on this rank."""
    count: int = 1
    is_expert: bool = False
    """Spread over expert-parallel ranks, and replicated over fewer ranks than the others."""


def stage_parameters(arch: Architecture, parallel: ParallelConfig, stage: int) -> list[SizedParameter]:
    """The parameters of one rank of a pipeline stage; all tensor-parallel ranks of it have equally many."""
    tensor, hidden = parallel.tensor, arch.hidden_size
    layers = arch.num_layers // parallel.pipeline
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    embedding = arch.padded_vocab_size // tensor * hidden
    found = [SizedParameter("embedding", embedding)] if is_first else []
    found += _attention(arch, tensor, layers)
    found += _mixture(arch, parallel, layers) if arch.num_experts else _mlp(arch, tensor, layers)
    if is_last:
        found.append(SizedParameter("final_norm", hidden))
        if not (arch.tied_embeddings and is_first):
            found.append(SizedParameter("head", embedding))
    return found


def _attention(arch: Architecture, tensor: int, layers: int) -> list[SizedParameter]:
    hidden, heads = arch.hidden_size, arch.num_heads * arch.head_dim
    rows = heads + 2 * arch.num_kv_heads * arch.head_dim
    found = [
        SizedParameter("norms", hidden, 2 * layers),
        SizedParameter("qkv", rows // tensor * hidden, layers),
        SizedParameter("projection", hidden * heads // tensor, layers),
    ]
    found += [SizedParameter("qkv_bias", rows // tensor, layers)] if arch.qkv_bias else []
    return found + ([SizedParameter("qk_norms", arch.head_dim, 2 * layers)] if arch.qk_norm else [])


def _mlp(arch: Architecture, tensor: int, layers: int) -> list[SizedParameter]:
    part = arch.ffn_size // tensor * arch.hidden_size
    return [SizedParameter("fc1", 2 * part, layers), SizedParameter("fc2", part, layers)]


def _mixture(arch: Architecture, parallel: ParallelConfig, layers: int) -> list[SizedParameter]:
    part, experts = arch.ffn_size * arch.hidden_size, arch.num_experts // parallel.expert * layers
    return [
        SizedParameter("router", arch.num_experts * arch.hidden_size, layers),
        SizedParameter("fc1", 2 * part, experts, is_expert=True),
        SizedParameter("fc2", part, experts, is_expert=True),
    ]


def served_bytes(arch: Architecture, size: int, *, in_fp8: bool) -> float:
    """Bytes of a whole model on a server, with `size` bytes a number; in FP8 its matrices have one."""
    parameters = whole(arch)
    matrices = [p for p in parameters if p.name in MATRICES] if in_fp8 else []
    return numel(parameters) * size - numel(matrices) * (size - 1)


def numel(parameters: list[SizedParameter]) -> int:
    """All of them."""
    return sum(p.numel * p.count for p in parameters)


def whole(arch: Architecture) -> list[SizedParameter]:
    """The model on one rank."""
    return stage_parameters(arch, ParallelConfig(), 0)


def active_numel(arch: Architecture) -> int:
    """Parameters of matrix products that a token passes through, the output head's included: of a mixture, those of its
    chosen experts."""
    share = arch.experts_per_token / arch.num_experts if arch.num_experts else 1.0
    counted = [p for p in whole(arch) if p.name in (*MATRICES, "router")]
    body = sum(p.numel * p.count * (share if p.is_expert else 1) for p in counted)
    return round(body) + arch.padded_vocab_size * arch.hidden_size


def body_numel(arch: Architecture) -> int:
    """`active_numel` without the output head."""
    return active_numel(arch) - arch.padded_vocab_size * arch.hidden_size


@dataclass(frozen=True, slots=True)
class Buffers:
    """Elements of a rank that Megatron's data-parallel wrapper and optimizer hold."""

    gradients: int
    optimized: int
    """Whose optimizer state is here."""


def buffers(parameters: list[SizedParameter], parallel: ParallelConfig, *, distributed: bool) -> Buffers:
    """With the distributed optimizer each rank with a copy of the weights has the state of its part of the (padded)
    gradient buffer."""
    gradients = optimized = 0
    for is_expert in (False, True):
        mine = [p for p in parameters if p.is_expert == is_expert]
        replicas = parallel.context * parallel.data * (parallel.tensor // parallel.expert if is_expert else 1)
        if not distributed:
            gradients, optimized = gradients + numel(mine), optimized + numel(mine)
        elif mine:
            padded = sum(_up(p.numel, _ALIGN) * p.count for p in mine)
            padded = _up(padded, math.lcm(replicas, _BUCKET_ALIGN))
            gradients, optimized = gradients + padded, optimized + padded // replicas
    return Buffers(gradients, optimized)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
