"""The one two-way table between Hugging Face and Megatron weights of dense decoders, and its two users.

A `Rule` knows how one Megatron parameter is read from a Hugging Face directory (only this rank's slice leaves the
disk) and how the shards of all tensor-parallel ranks merge back into Hugging Face tensors. `load` fills a model,
`export` streams the whole student to the leader of each replica, as the engines and the exporter want it.

Megatron's layouts: linear_qkv holds, per key-value group, its query rows, its key rows, its value rows;
linear_fc1 holds, per tensor-parallel shard, the gate rows and then the up rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_opd.parallel import Parallel
from megatron_opd.student import groups
from megatron_opd.student.architecture import Architecture
from megatron_opd.student.safetensors_dir import TensorDir

Shards = list[torch.Tensor]
Named = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron parameter: how to read a shard of it, and how to merge its shards."""

    split: Callable[[TensorDir, int, int], torch.Tensor]
    """(directory, shard, number of shards) -> this shard."""
    merge: Callable[[Shards], Named]
    """Shards of all tensor-parallel ranks -> (Hugging Face name, full tensor) pairs."""


def rules(arch: Architecture, *, layers: range, first: bool, last: bool) -> dict[str, Rule]:
    """The table of a stage: Megatron's parameter name (layers counted from the stage's first) -> Rule."""
    table: dict[str, Rule] = {}
    if first:
        table["embedding.word_embeddings.weight"] = _vocab("model.embed_tokens.weight", arch)
    for local, layer in enumerate(layers):
        hf, mg = f"model.layers.{layer}.", f"decoder.layers.{local}."
        table[mg + "input_layernorm.weight"] = _replicated(hf + "input_layernorm.weight")
        table[mg + "self_attention.linear_qkv.weight"] = _qkv(hf + "self_attn.", "weight", arch)
        if arch.qkv_bias:
            table[mg + "self_attention.linear_qkv.bias"] = _qkv(hf + "self_attn.", "bias", arch)
        if arch.qk_norm:
            table[mg + "self_attention.q_layernorm.weight"] = _replicated(hf + "self_attn.q_norm.weight")
            table[mg + "self_attention.k_layernorm.weight"] = _replicated(hf + "self_attn.k_norm.weight")
        table[mg + "self_attention.linear_proj.weight"] = _columns(hf + "self_attn.o_proj.weight")
        table[mg + "pre_mlp_layernorm.weight"] = _replicated(hf + "post_attention_layernorm.weight")
        table[mg + "mlp.linear_fc1.weight"] = _gate_up(hf + "mlp.gate_proj.weight", hf + "mlp.up_proj.weight")
        table[mg + "mlp.linear_fc2.weight"] = _columns(hf + "mlp.down_proj.weight")
    if last:
        table["decoder.final_layernorm.weight"] = _replicated("model.norm.weight")
        if not arch.tied_embeddings:
            table["output_layer.weight"] = _vocab("lm_head.weight", arch)
        elif not first:  # a second copy of the embedding, kept equal by Megatron, exported by the first stage only
            table["output_layer.weight"] = Rule(_vocab("model.embed_tokens.weight", arch).split, lambda _: [])
    return table


def stage_rules(arch: Architecture, parallel: Parallel) -> dict[str, Rule]:
    """The table of this rank's pipeline stage (equal stages)."""
    size, stage = arch.num_layers // parallel.pipeline_size, parallel.pipeline_rank
    layers = range(stage * size, (stage + 1) * size)
    return rules(arch, layers=layers, first=stage == 0, last=parallel.is_last_stage)


@torch.no_grad()
def load(model: torch.nn.Module, arch: Architecture, model_dir: str | Path, parallel: Parallel) -> None:
    """Fill this rank's part of the model from a Hugging Face directory; every parameter must be hit.

    Raises ValueError when a tensor is missing or has a shape that contradicts config.json.
    """
    table = stage_rules(arch, parallel)
    with TensorDir(model_dir) as tensors:
        for name, parameter in model.named_parameters():
            if name not in table:
                raise ValueError(f"{model_dir}: no rule for Megatron's parameter {name}")
            shard = table[name].split(tensors, parallel.tensor_rank, parallel.tensor_size)
            if shard.shape != parameter.shape:
                raise ValueError(
                    f"{model_dir}: the tensors for {name} have shape {list(shard.shape)}, but config.json asks for"
                    f" {list(parameter.shape)}"
                )
            parameter.copy_(shard)


def load_head_rows(model_dir: str | Path, arch: Architecture, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a model's output head, [stop - start, D]; rows beyond its vocabulary are 0.

    For teachers: the rows are the *student's* shard of the vocabulary, whatever the teacher's own padding.
    """
    name = "model.embed_tokens.weight" if arch.tied_embeddings else "lm_head.weight"
    with TensorDir(model_dir) as tensors:
        return read_vocab_rows(tensors, name, start, stop)


def read_vocab_rows(tensors: TensorDir, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a [vocabulary, D] tensor; rows that it does not have are 0."""
    num_real = tensors.shape(name)[0]
    real = tensors.read(name, slice(min(start, num_real), min(stop, num_real)))
    missing = stop - start - real.shape[0]
    return torch.cat([real, real.new_zeros(missing, real.shape[1])]) if missing else real


@torch.no_grad()
def export(
    model: torch.nn.Module, arch: Architecture, parallel: Parallel, bucket_bytes: int = 256 << 20
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream (Hugging Face name, full tensor) of the whole model; pairs are yielded on the leader of each replica.

    A collective: every rank must run the iterator to its end. No rank holds more than a bucket beside its own shard.
    """
    for stage in range(parallel.pipeline_size):
        if parallel.pipeline_rank == stage:
            for merged in _merged_buckets(model, arch, parallel, bucket_bytes):
                if parallel.is_leader:
                    yield from merged
                elif parallel.tensor_rank == 0:
                    _send(merged, parallel)
            if parallel.tensor_rank == 0 and stage > 0:
                _send(None, parallel)
        elif parallel.is_leader:
            while (received := _receive(stage, parallel)) is not None:
                yield from received


def _merged_buckets(
    model: torch.nn.Module, arch: Architecture, parallel: Parallel, bucket_bytes: int
) -> Iterator[Named]:
    """This stage's Hugging Face tensors, bucket by bucket: one gather over the tensor-parallel ranks a bucket."""
    table = stage_rules(arch, parallel)
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, parameter in model.named_parameters():
        bucket.append((name, parameter.detach()))
        size += parameter.numel() * parameter.element_size() * parallel.tensor_size
        if size >= bucket_bytes:
            yield _merge_bucket(bucket, table, parallel)
            bucket, size = [], 0
    if bucket:
        yield _merge_bucket(bucket, table, parallel)


def _merge_bucket(bucket: Named, table: dict[str, Rule], parallel: Parallel) -> Named:
    flat = torch.cat([tensor.reshape(-1) for _, tensor in bucket])
    shards = [flat]
    if parallel.tensor_size > 1:
        shards = [torch.empty_like(flat) for _ in range(parallel.tensor_size)]
        dist.all_gather(shards, flat, group=parallel.tensor_group)
    if parallel.tensor_rank != 0:
        return []
    merged: Named = []
    sizes = [tensor.numel() for _, tensor in bucket]
    for (name, tensor), *pieces in zip(bucket, *(shard.split(sizes) for shard in shards), strict=True):
        merged += table[name].merge([piece.view(tensor.shape) for piece in pieces])
    return merged


def _send(merged: Named | None, parallel: Parallel) -> None:
    """To the first stage: the names and shapes as an object, then one flat tensor; None says that no more follows."""
    leader = dist.get_global_rank(parallel.pipeline_group, 0)
    plan = None if merged is None else [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in merged]
    dist.send_object_list([plan], dst=leader, group=parallel.replica_group)
    if merged:
        dist.send(torch.cat([tensor.reshape(-1) for _, tensor in merged]), leader, group=parallel.pipeline_group)


def _receive(stage: int, parallel: Parallel) -> Named | None:
    source = dist.get_global_rank(parallel.pipeline_group, stage)
    box: list[Any] = [None]
    dist.recv_object_list(box, src=source, group=parallel.replica_group)
    plan = box[0]
    if not plan:
        return None if plan is None else []
    shapes = [torch.Size(shape) for _, shape, _ in plan]
    flat = torch.empty(sum(s.numel() for s in shapes), dtype=plan[0][2], device=groups.device())
    dist.recv(flat, source, group=parallel.pipeline_group)
    pieces = flat.split([s.numel() for s in shapes])
    return [(name, piece.view(shape)) for (name, _, _), piece, shape in zip(plan, pieces, shapes, strict=True)]


def _part(total: int, shard: int, num_shards: int) -> slice:
    size = total // num_shards
    return slice(shard * size, (shard + 1) * size)


def _replicated(name: str) -> Rule:
    return Rule(lambda tensors, *_: tensors.read(name), lambda shards: [(name, shards[0])])


def _columns(name: str) -> Rule:
    """Split along the input dimension (row-parallel in Megatron's words)."""

    def split(tensors: TensorDir, shard: int, num_shards: int) -> torch.Tensor:
        return tensors.read(name, slice(None), _part(tensors.shape(name)[1], shard, num_shards))

    return Rule(split, lambda shards: [(name, torch.cat(shards, dim=1))])


def _vocab(name: str, arch: Architecture) -> Rule:
    """Rows split over ranks after padding with zeros at the end."""

    def split(tensors: TensorDir, shard: int, num_shards: int) -> torch.Tensor:
        part = _part(arch.padded_vocab_size, shard, num_shards)
        return read_vocab_rows(tensors, name, part.start, part.stop)

    return Rule(split, lambda shards: [(name, torch.cat(shards)[: arch.vocab_size])])


def _gate_up(gate: str, up: str) -> Rule:
    def split(tensors: TensorDir, shard: int, num_shards: int) -> torch.Tensor:
        return torch.cat([tensors.read(n, _part(tensors.shape(n)[0], shard, num_shards)) for n in (gate, up)])

    def merge(shards: Shards) -> Named:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return [(gate, torch.cat(gates)), (up, torch.cat(ups))]

    return Rule(split, merge)


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

    return Rule(split, merge)
