"""Where adapters sit: which Hugging Face modules the rows of each of Megatron's linear layers are.

Adapters are of Hugging Face's modules, as in peft, so each of q, k and v has an A and a B of its own although Megatron
multiplies the three at once. Needs no Megatron, so that checks and the converter know the layout too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_opd.config import LoraConfig
from megatron_opd.config.lora import MLP_MODULES
from megatron_opd.models.architecture import Architecture

SUFFIX = "_lora"
"""A linear layer's adapter is its neighbour: linear_qkv's is linear_qkv_lora."""


@dataclass(frozen=True, slots=True)
class Place:
    """One linear layer of a decoder layer, as big as on one of some tensor-parallel ranks."""

    megatron: str
    """Name within the layer."""
    hf: str
    """What the names of its modules begin with within a Hugging Face layer."""
    parts: Mapping[str, int]
    """Its modules, in order, with the rows of each in a group; the layer is `groups` such groups of rows."""
    groups: int
    inputs: int
    row_parallel: bool
    """Split along its inputs, not along its rows."""

    def rows(self, part: str) -> int:
        """Rows of one module."""
        return self.parts[part] * self.groups

    def interleave(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[..., rows of the module] of some modules -> [..., rows of the layer]; 0 for modules that are not given."""
        given = next(iter(outputs.values()))
        lead = given.shape[:-1]
        grouped = [
            outputs[part].unflatten(-1, (self.groups, rows))
            if part in outputs
            else given.new_zeros(*lead, self.groups, rows)
            for part, rows in self.parts.items()
        ]
        return torch.cat(grouped, dim=-1).flatten(-2) if len(grouped) > 1 else given


def merged(
    weight: torch.Tensor, place: Place, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], scale: float
) -> torch.Tensor:
    """W + scale B A of a layer's modules with (A, B), in W's type, computed in fp32."""
    deltas = {part: a.float().T @ b.float().T for part, (a, b) in pairs.items()}
    return (weight.float() + scale * place.interleave(deltas).T).to(weight.dtype)


def places(arch: Architecture, config: LoraConfig, num_shards: int = 1) -> list[Place]:
    """The linear layers of a decoder layer in which some module is adapted."""
    heads, kv_heads, size = arch.num_heads, arch.num_kv_heads, arch.head_dim
    ffn, hidden = arch.ffn_size // num_shards, arch.hidden_size
    qkv = {"q_proj": heads // kv_heads * size, "k_proj": size, "v_proj": size}
    found = [
        Place("self_attention.linear_qkv", "self_attn.", qkv, kv_heads // num_shards, hidden, False),
        Place("self_attention.linear_proj", "self_attn.", {"o_proj": hidden}, 1, heads * size // num_shards, True),
        Place("mlp.linear_fc1", "mlp.", {"gate_proj": ffn, "up_proj": ffn}, 1, hidden, False),
        Place("mlp.linear_fc2", "mlp.", {"down_proj": hidden}, 1, ffn, True),
    ]
    return [place for place in found if set(place.parts) & set(config.modules)]


def check_targets(arch: Architecture, config: LoraConfig) -> list[str]:
    """Problems of these adapters on this student."""
    inside_experts = [name for name in config.modules if name in MLP_MODULES]
    if config.rank > 0 and arch.num_experts and inside_experts:
        return [
            f"lora.targets: student.model is a mixture of experts, whose {', '.join(inside_experts)} cannot have"
            " adapters; name modules of the attention: [qkv, o_proj]"
        ]
    return []


def facts(config: LoraConfig) -> dict[str, Any]:
    """What must agree for adapters to be those of a checkpoint, by setting."""
    if not config.rank:
        return {"lora.rank": 0}
    return {"lora.rank": config.rank, "lora.alpha": config.alpha, "lora.targets": list(config.modules)}
