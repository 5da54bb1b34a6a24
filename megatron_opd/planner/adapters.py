"""LoRA on a rank: which parameters are trained, and what their layers keep for the backward pass.

The layout of `models/lora_layout.py`, whose tensors the planner does without; tests hold the two against each other.
"""

from __future__ import annotations

from megatron_opd.config import LoraConfig, ParallelConfig
from megatron_opd.models.architecture import Architecture
from megatron_opd.planner import sizes
from megatron_opd.planner.sizes import SizedParameter

_ROW_PARALLEL = ("o_proj", "down_proj")


def trained(arch: Architecture, lora: LoraConfig, parallel: ParallelConfig, stage: int) -> list[SizedParameter]:
    """The parameters of one rank of a stage that have gradients: adapters, or where there are none, all."""
    if lora.rank:
        return parameters(arch, lora, parallel, stage)
    return sizes.stage_parameters(arch, parallel, stage)


def parameters(arch: Architecture, lora: LoraConfig, parallel: ParallelConfig, stage: int) -> list[SizedParameter]:
    """A and B of every adapted module of one rank of a stage."""
    layers = arch.num_layers // parallel.pipeline
    found = []
    for name, (inputs, outputs) in _sides(arch, lora).items():
        split_a, split_b = (parallel.tensor, 1) if name in _ROW_PARALLEL else (1, parallel.tensor)
        found.append(SizedParameter(f"{name}_A", lora.rank * inputs // split_a, layers))
        found.append(SizedParameter(f"{name}_B", lora.rank * outputs // split_b, layers))
    return found


def kept(arch: Architecture, lora: LoraConfig, parallel: ParallelConfig, tokens: int) -> float:
    """Elements that the adapters of one layer keep: A x, and the A's of modules with one input put together."""
    made = parameters(arch, lora, parallel, 0)
    return tokens * lora.rank * len(made) / 2 + sum(p.numel for p in made if p.name.endswith("_A"))


def _sides(arch: Architecture, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the adapted modules, whole."""
    hidden, ffn = arch.hidden_size, arch.ffn_size
    queries, keys = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    every = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, ffn),
        "up_proj": (hidden, ffn),
        "down_proj": (ffn, hidden),
    }
    return {name: every[name] for name in lora.modules}
