"""The one two-way table between Hugging Face and Megatron weights.

A `Rule` knows how one Megatron parameter is read from a Hugging Face directory (only the wanted slice leaves the disk)
and how the shards of all tensor-parallel ranks merge back into Hugging Face tensors. The trainer (`weights.py`), the
weight sync and the converter (`convert.py`) all use it.

Megatron's layouts: linear_qkv holds, per key-value group, its query rows, its key rows, its value rows;
linear_fc1 holds, per tensor-parallel shard, the gate rows and then the up rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_opd.core.parallel import Parallel
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.safetensors_dir import TensorDir

Shards = list[torch.Tensor]
Named = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron parameter: its whole shape, how to read a shard of it, and how to merge its shards."""

    shape: tuple[int, ...]
    """Over all tensor-parallel ranks, vocabulary padding included."""
    split: Callable[[TensorDir, int, int], torch.Tensor]
    """(directory, shard, number of shards) -> this shard."""
    merge: Callable[[Shards], Named]
    """Shards of all tensor-parallel ranks -> (Hugging Face name, full tensor) pairs."""


def rules(arch: Architecture, *, layers: range, first: bool, last: bool, experts: range) -> dict[str, Rule]:
    """The table of a stage: Megatron's parameter name (layers and experts counted from the rank's first) -> Rule."""
    table: dict[str, Rule] = {}
    hidden, heads = arch.hidden_size, arch.num_heads * arch.head_dim
    if first:
        table["embedding.word_embeddings.weight"] = _vocab("model.embed_tokens.weight", arch)
    for local, layer in enumerate(layers):
        hf, mg = f"model.layers.{layer}.", f"decoder.layers.{local}."
        table[mg + "input_layernorm.weight"] = _replicated(hf + "input_layernorm.weight", (hidden,))
        table[mg + "self_attention.linear_qkv.weight"] = _qkv(hf + "self_attn.", "weight", arch)
        if arch.qkv_bias:
            table[mg + "self_attention.linear_qkv.bias"] = _qkv(hf + "self_attn.", "bias", arch)
        if arch.qk_norm:
            for x in "qk":
                norm = _replicated(hf + f"self_attn.{x}_norm.weight", (arch.head_dim,))
                table[mg + f"self_attention.{x}_layernorm.weight"] = norm
        table[mg + "self_attention.linear_proj.weight"] = _columns(hf + "self_attn.o_proj.weight", (hidden, heads))
        table[mg + "pre_mlp_layernorm.weight"] = _replicated(hf + "post_attention_layernorm.weight", (hidden,))
        if arch.num_experts:
            table[mg + "mlp.router.weight"] = _replicated(hf + "mlp.gate.weight", (arch.num_experts, hidden))
            for j, expert in enumerate(experts):
                table |= _mlp(mg + f"mlp.experts.local_experts.{j}.", hf + f"mlp.experts.{expert}.", arch)
        else:
            table |= _mlp(mg + "mlp.", hf + "mlp.", arch)
    if last:
        table["decoder.final_layernorm.weight"] = _replicated("model.norm.weight", (hidden,))
        if not arch.tied_embeddings:
            table["output_layer.weight"] = _vocab("lm_head.weight", arch)
        elif not first:  # a second copy of the embedding, kept equal by Megatron, exported by the first stage only
            embedding = _vocab("model.embed_tokens.weight", arch)
            table["output_layer.weight"] = Rule(embedding.shape, embedding.split, lambda _: [])
    return table


def _mlp(mg: str, hf: str, arch: Architecture) -> dict[str, Rule]:
    return {
        mg + "linear_fc1.weight": _gate_up(hf, arch),
        mg + "linear_fc2.weight": _columns(hf + "down_proj.weight", (arch.hidden_size, arch.ffn_size)),
    }


_FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Transformer Engine's linears hold the norm in front of them; a mixture's experts do not, so its norm stays."""


def plain_name(name: str) -> str:
    """The table's name of a parameter that Transformer Engine's layers name otherwise; any other name as it is."""
    for plain, fused in _FUSED_NORMS.items():
        if name.endswith(f".{fused}"):
            return name.removesuffix(fused) + plain
    return name


def fused_name(name: str, arch: Architecture) -> str:
    """What Transformer Engine's layers call a parameter of the table, or of a layer without its prefix."""
    for plain, fused in _FUSED_NORMS.items():
        is_alone = bool(arch.num_experts) and plain == "pre_mlp_layernorm.weight"
        if (name == plain or name.endswith(f".{plain}")) and not is_alone:
            return name.removesuffix(plain) + fused
    return name


def all_rules(arch: Architecture) -> dict[str, Rule]:
    """The table of the whole model on one rank."""
    return rules(arch, layers=range(arch.num_layers), first=True, last=True, experts=range(arch.num_experts))


def hf_shapes(table: dict[str, Rule]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor that a table makes, without data."""
    empty = (rule.merge([torch.empty(rule.shape, device="meta")]) for rule in table.values())
    return {name: tuple(tensor.shape) for merged in empty for name, tensor in merged}


def stage_rules(arch: Architecture, parallel: Parallel, *, expert_rank: int | None = None) -> dict[str, Rule]:
    """The table of this rank's pipeline stage (equal stages), with this or another expert-parallel rank's experts."""
    size, stage = arch.num_layers // parallel.pipeline_size, parallel.pipeline_rank
    num_experts = arch.num_experts // parallel.expert_size
    first_expert = (parallel.expert_rank if expert_rank is None else expert_rank) * num_experts
    return rules(
        arch,
        layers=range(stage * size, (stage + 1) * size),
        first=stage == 0,
        last=parallel.is_last_stage,
        experts=range(first_expert, first_expert + num_experts),
    )


def is_expert(name: str) -> bool:
    """Whether a Megatron parameter belongs to one expert: spread over expert ranks, whole on each of them."""
    return ".experts." in name


def _part(total: int, shard: int, num_shards: int) -> slice:
    size = total // num_shards
    return slice(shard * size, (shard + 1) * size)


def _replicated(name: str, shape: tuple[int, ...]) -> Rule:
    return Rule(shape, lambda tensors, *_: tensors.read(name), lambda shards: [(name, shards[0])])


def _columns(name: str, shape: tuple[int, ...]) -> Rule:
    """Split along the input dimension (row-parallel in Megatron's words)."""

    def split(tensors: TensorDir, shard: int, num_shards: int) -> torch.Tensor:
        return tensors.read(name, slice(None), _part(tensors.shape(name)[1], shard, num_shards))

    return Rule(shape, split, lambda shards: [(name, torch.cat(shards, dim=1))])


def _vocab(name: str, arch: Architecture) -> Rule:
    """Rows split over ranks after padding with zeros at the end."""

    def split(tensors: TensorDir, shard: int, num_shards: int) -> torch.Tensor:
        part = _part(arch.padded_vocab_size, shard, num_shards)
        return read_vocab_rows(tensors, name, part.start, part.stop)

    shape = (arch.padded_vocab_size, arch.hidden_size)
    return Rule(shape, split, lambda shards: [(name, torch.cat(shards)[: arch.vocab_size])])


def _gate_up(prefix: str, arch: Architecture) -> Rule:
    gate, up = prefix + "gate_proj.weight", prefix + "up_proj.weight"

    def split(tensors: TensorDir, shard: int, num_shards: int) -> torch.Tensor:
        return torch.cat([tensors.read(n, _part(tensors.shape(n)[0], shard, num_shards)) for n in (gate, up)])

    def merge(shards: Shards) -> Named:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return [(gate, torch.cat(gates)), (up, torch.cat(ups))]

    return Rule((2 * arch.ffn_size, arch.hidden_size), split, merge)


def _qkv(prefix: str, kind: str, arch: Architecture) -> Rule:
    """q_proj, k_proj, v_proj <-> linear_qkv, interleaved by key-value group; `kind` is weight or bias."""
    names = [f"{prefix}{p}_proj.{kind}" for p in "qkv"]
    per_group = [arch.num_heads // arch.num_kv_heads * arch.head_dim, arch.head_dim, arch.head_dim]

    def split(tensors: TensorDir, shard: int, num_shards: int) -> torch.Tensor:
        parts = [tensors.read(n, _part(tensors.shape(n)[0], shard, num_shards)) for n in names]
        grouped = [x.reshape(-1, rows, *x.shape[1:]) for x, rows in zip(parts, per_group, strict=True)]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def merge(shards: Shards) -> Named:
        whole = torch.cat(shards)
        grouped = whole.view(-1, sum(per_group), *whole.shape[1:])
        return [(n, x.flatten(0, 1)) for n, x in zip(names, grouped.split(per_group, dim=1), strict=True)]

    rows = sum(per_group) * arch.num_kv_heads
    return Rule((rows, arch.hidden_size) if kind == "weight" else (rows,), split, merge)


def read_vocab_rows(tensors: TensorDir, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a [vocabulary, D] tensor; rows that it does not have are 0."""
    num_real = tensors.shape(name)[0]
    real = tensors.read(name, slice(min(start, num_real), min(stop, num_real)))
    missing = stop - start - real.shape[0]
    return torch.cat([real, real.new_zeros(missing, real.shape[1])]) if missing else real
