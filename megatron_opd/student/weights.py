"""Weights between Hugging Face directories and a Megatron model on its ranks, by the table in `weight_map.py`.

`load` fills a model, each rank reading only its own slices; `export` streams the whole student to the leader of each
replica, as the engines and the exporter want it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_opd.core.parallel import Parallel
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.safetensors_dir import TensorDir
from megatron_opd.models.weight_map import Named, Rule, Shards, is_expert, plain_name, read_vocab_rows, stage_rules
from megatron_opd.precision.overflow import check_fp16
from megatron_opd.student import groups, lora

BUCKET_BYTES = 64 << 20
"""Weights that are gathered together, of all ranks that share them."""


@torch.no_grad()
def load(model: torch.nn.Module, arch: Architecture, model_dir: str | Path, parallel: Parallel) -> None:
    """Fill this rank's part of the model from a Hugging Face directory; every parameter must be hit.

    Raises ValueError when a tensor is missing, has a shape that contradicts config.json, or is too large for fp16.
    """
    table = stage_rules(arch, parallel)
    with TensorDir(model_dir) as tensors:
        for own_name, parameter in model.named_parameters():
            name = plain_name(own_name)
            if name not in table:
                raise ValueError(f"{model_dir}: no rule for Megatron's parameter {name}")
            grid = (0, 1) if is_expert(name) else (parallel.tensor_rank, parallel.tensor_size)
            shard = table[name].split(tensors, *grid)
            if shard.shape != parameter.shape:
                raise ValueError(
                    f"{model_dir}: the tensors for {name} have shape {list(shard.shape)}, but config.json requires"
                    f" {list(parameter.shape)}"
                )
            parameter.copy_(shard)
            check_fp16(parameter, shard, f"{model_dir}: {name}")


def load_head_rows(model_dir: str | Path, arch: Architecture, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a model's output head, [stop - start, D]; rows beyond its vocabulary are 0.

    For teachers: the rows are the *student's* shard of the vocabulary, whatever the teacher's own padding.
    """
    name = "model.embed_tokens.weight" if arch.tied_embeddings else "lm_head.weight"
    with TensorDir(model_dir) as tensors:
        return read_vocab_rows(tensors, name, start, stop)


def export(
    model: torch.nn.Module, arch: Architecture, parallel: Parallel, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream (Hugging Face name, full tensor) of the whole model; pairs are yielded on the leader of each replica.

    A collective: every rank must run the iterator to its end. No rank holds more than a bucket beside its own shard.
    Adapters are added to the weights that they change.
    """
    return _to_leader(_merged_buckets(model, arch, parallel, bucket_bytes), parallel)


def export_adapters(
    model: torch.nn.Module, parallel: Parallel, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same for the adapters alone, under the names of peft's files."""
    return _to_leader(_adapter_buckets(model, parallel, bucket_bytes), parallel)


@torch.no_grad()
def _to_leader(buckets: Iterator[Named], parallel: Parallel) -> Iterator[tuple[str, torch.Tensor]]:
    """What each stage in turn has on its first tensor-parallel rank; `buckets` is not begun before the stage's turn.
    Other context-parallel ranks have copies, and nothing to do."""
    if parallel.context_rank > 0:
        return
    for stage in range(parallel.pipeline_size):
        if parallel.pipeline_rank == stage:
            for merged in buckets:
                if parallel.is_leader:
                    yield from merged
                elif parallel.tensor_rank == 0:
                    _send(merged, parallel)
                del merged  # before the next bucket is made
            if parallel.tensor_rank == 0 and stage > 0:
                _send(None, parallel)
        elif parallel.is_leader:
            while (received := _receive(stage, parallel)) is not None:
                yield from received


def _merged_buckets(
    model: torch.nn.Module, arch: Architecture, parallel: Parallel, bucket_bytes: int
) -> Iterator[Named]:
    """This stage's Hugging Face tensors, bucket by bucket: one gather over the ranks that share it a bucket."""
    tables = [stage_rules(arch, parallel, expert_rank=rank) for rank in range(parallel.expert_size)]
    for experts in (False, True):
        all_named = ((plain_name(name), tensor) for name, tensor in lora.merged_parameters(model))
        named = ((name, tensor) for name, tensor in all_named if is_expert(name) == experts)
        num_shards = parallel.expert_size if experts else parallel.tensor_size
        for bucket in _buckets(named, bucket_bytes // num_shards):
            shards = _gather(bucket, parallel.expert_group if experts else parallel.tensor_group, num_shards)
            names = [name for name, _ in bucket]
            if parallel.tensor_rank != 0:
                yield []
            elif experts:  # every shard is whole experts of its own
                yield [hf for table, shard in zip(tables, shards, strict=True) for hf in _merge(table, names, [shard])]
            else:
                yield _merge(tables[0], names, shards)


def _adapter_buckets(model: torch.nn.Module, parallel: Parallel, bucket_bytes: int) -> Iterator[Named]:
    split = {name: dim for name, _, dim in lora.peft_parameters(model)}
    named = ((name, shard) for name, shard, _ in lora.peft_parameters(model))
    for bucket in _buckets(named, bucket_bytes // parallel.tensor_size):
        shards = _gather(bucket, parallel.tensor_group, parallel.tensor_size)
        whole = []
        for (name, _), *pieces in zip(bucket, *shards, strict=True):
            dim = split[name]
            whole.append((name, pieces[0] if dim is None else torch.cat(pieces, dim)))
        yield whole if parallel.tensor_rank == 0 else []


def _merge(table: dict[str, Rule], names: list[str], shards: list[Shards]) -> Named:
    return [hf for name, *pieces in zip(names, *shards, strict=True) for hf in table[name].merge(pieces)]


def _buckets(named: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> Iterator[Named]:
    bucket: Named = []
    size = 0
    for name, tensor in named:
        bucket.append((name, tensor))
        size += tensor.numel() * tensor.element_size()
        if size >= max_bytes:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _gather(bucket: Named, group: dist.ProcessGroup, num_shards: int) -> list[Shards]:
    """Every rank's tensors of a bucket, in the order of ranks."""
    if num_shards == 1:
        return [[tensor for _, tensor in bucket]]
    flat = torch.cat([tensor.reshape(-1) for _, tensor in bucket])
    everyone = [torch.empty_like(flat) for _ in range(num_shards)]
    dist.all_gather(everyone, flat, group=group)
    sizes, shapes = [t.numel() for _, t in bucket], [t.shape for _, t in bucket]
    return [[p.view(s) for p, s in zip(shard.split(sizes), shapes, strict=True)] for shard in everyone]


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
