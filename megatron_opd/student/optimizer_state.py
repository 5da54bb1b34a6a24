"""The distributed optimizer's state in checkpoints: written and read by the ranks that have it.

A checkpoint holds a tensor a parameter and kind of state (`fully_reshardable` in Megatron's words), so any layout can
load it. Each data-parallel rank has a part of the buffer that all parameters lie in. To make whole tensors of that,
Megatron's own way gathers all buckets on every rank, on the GPU and again in host memory; its efficient form gathers
them on one rank, which then writes alone. Here a parameter's state goes to the rank that has most of it. Most
parameters lie on one rank, so little travels, a rank needs host memory for about its own share, and all ranks write. A
load reads straight into what lies on one rank, and no rank reads what it has no part of.

In fp32 the optimizer's weights are the model's: the same memory. Then the file has them once, under both names, which
is 12 bytes a parameter. A load reads the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Megatron's word for checkpoints with a tensor a parameter, in its metadata."""
_PREFIX, _WEIGHTS, _MOMENTS = "optimizer.state", "param", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Piece:
    """The elements [start, end) of a flat parameter, which a data-parallel rank has."""

    rank: int
    start: int
    end: int


def pieces(place: range, bucket: range, num_ranks: int) -> list[Piece]:
    """Who has which elements of a parameter at `place` of its buffer, in a bucket that is cut evenly among the ranks.

    In the order of ranks; without ranks that have none.
    """
    share = len(bucket) // num_ranks
    first, last = (place.start - bucket.start) // share, (place.stop - 1 - bucket.start) // share
    found = []
    for rank in range(first, last + 1):
        begin = bucket.start + rank * share
        start, end = max(place.start, begin), min(place.stop, begin + share)
        found.append(Piece(rank, start - place.start, end - place.start))
    return found


def owner(of: list[Piece]) -> int:
    """The rank that has most of a parameter; of equals the first."""
    return max(of, key=lambda piece: (piece.end - piece.start, -piece.rank)).rank


@contextmanager
def by_owners(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Within, `optimizer.sharded_state_dict` with the metadata `SHARDING` is made as this module says, which is
    collective, and what was read for it is loaded."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    ours = [part for part in parts if isinstance(part, DistributedOptimizer)]
    for part in ours:
        part.sharded_param_state_fully_reshardable = partial(_sharded, part)
        part.load_parameter_state_from_fully_reshardable = partial(
            _load, part, part.load_parameter_state_from_fully_reshardable
        )
    try:
        yield
    finally:
        for part in ours:
            del part.sharded_param_state_fully_reshardable, part.load_parameter_state_from_fully_reshardable


def second_names(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, str]:
    """Second names, {the model's: the optimizer's}, of weights that the optimizer has in the model's memory. `model` is
    the model's sharded state."""
    described = _described(model)
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return {
        described[parameter].key: f"{_PREFIX}.{_WEIGHTS}.{described[parameter].key}"
        for part in parts
        if isinstance(part, DistributedOptimizer)
        for parameter, held in _held(part)
        if _has(part, held) and _WEIGHTS not in _states(part, parameter)
    }


def _sharded(
    optimizer: DistributedOptimizer, model: dict[str, Any], is_loading: bool = False, metadata: Any = None
) -> dict[int, dict[str, Any]]:
    """In place of Megatron's method: {number of the parameter: {state: sharded tensor}}, of what this rank is to write,
    or to read. `model` is the model's sharded state."""
    del metadata
    described = _described(model)
    found = {}
    for number, (parameter, held) in enumerate(_held(optimizer)):
        whole = _to_read(optimizer, parameter, held) if is_loading else _to_write(optimizer, parameter, held)
        if whole is not None:
            copy = _copy_number(optimizer, held)
            found[number] = {name: _named(described[parameter], name, data, copy) for name, data in whole.items()}
    return found


def _load(optimizer: DistributedOptimizer, megatrons: Callable[[Any], None], found: dict[int, dict[str, Any]]) -> None:
    """In place of Megatron's method, which wants weights, too."""
    for number, (parameter, held) in enumerate(_held(optimizer)):
        if _has(optimizer, held):
            found[number] = {_WEIGHTS: parameter.detach(), **found[number]}
    megatrons(found)


def _described(model: dict[str, Any]) -> dict[Any, Any]:
    """The sharded tensor, or the factory of several, of each parameter."""
    tensors, _ = extract_sharded_tensors_and_factories(model)
    return {sharded.data: sharded for sharded in nested_values(tensors)}


def _has(optimizer: DistributedOptimizer, held: list[Piece]) -> bool:
    """Whether this rank has a part of a parameter."""
    return optimizer.data_parallel_group.rank() in [piece.rank for piece in held]


def _held(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, list[Piece]]]:
    """All parameters in Megatron's order, and who has what of them."""
    num_ranks = optimizer.data_parallel_group.size()
    for buffer in optimizer.buffers:
        for parameter, (start, end, number) in buffer.param_index_map.items():
            bucket = buffer.buckets[number]
            place = range(bucket.offset, bucket.offset + bucket.grad_data.numel())
            yield parameter, pieces(range(start, end), place, num_ranks)


def _to_write(
    optimizer: DistributedOptimizer, parameter: torch.nn.Parameter, held: list[Piece]
) -> dict[str, torch.Tensor] | None:
    """Whole tensors on the parameter's owner: its own where it has all, else in host memory, made of what the others
    send. None on the other ranks. All ranks go through the parameters in one order, so nobody waits in a circle."""
    rank, to = optimizer.data_parallel_group.rank(), owner(held)
    mine = next((piece for piece in held if piece.rank == rank), None)
    if mine is None:
        return None
    states = _states(optimizer, parameter)
    if len(held) == 1:
        return {name: state.detach().view(parameter.shape) for name, state in states.items()}
    group = optimizer.data_parallel_group_gloo
    if rank != to:
        for state in states.values():
            dist.send(state.detach().cpu().contiguous(), group=group, group_dst=to)
        return None
    made = {}
    for name, state in states.items():
        whole = torch.empty(parameter.numel(), dtype=state.dtype, device="cpu")
        made[name] = whole.view(parameter.shape)
        for piece in held:
            part = whole[piece.start : piece.end]
            if piece is mine:
                part.copy_(state.detach())
            else:
                dist.recv(part, group=group, group_src=piece.rank)
    return made


def _to_read(
    optimizer: DistributedOptimizer, parameter: torch.nn.Parameter, held: list[Piece]
) -> dict[str, torch.Tensor] | None:
    """Where to read a parameter's state to: the optimizer's own tensors where they are whole, else host memory, from
    which Megatron takes this rank's part. None where this rank has none."""
    if not _has(optimizer, held):
        return None
    states = _states(optimizer, parameter)
    if len(held) == 1:
        return {name: state.detach().view(parameter.shape) for name, state in states.items()}
    return {name: torch.empty(parameter.shape, dtype=state.dtype, device="cpu") for name, state in states.items()}


def _states(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """This rank's part of a parameter's state, flat; without weights where they are the model's own memory."""
    found = optimizer._get_main_param_and_optimizer_states(parameter)
    is_own = found[_WEIGHTS].untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr()
    return {name: found[name] for name in (_WEIGHTS, *_MOMENTS) if name != _WEIGHTS or is_own}


def _copy_number(optimizer: DistributedOptimizer, held: list[Piece]) -> int:
    """0 on the owner, which Megatron has write, and another number on each of the others that read the same."""
    rank = optimizer.data_parallel_group.rank()
    return 0 if rank == owner(held) else 1 + rank


def _named(described: Any, name: str, data: torch.Tensor, copy: int) -> Any:
    """`data` as the state `name` of the parameter whose place in the model is `described`."""
    assert len(described.replica_id) == 3, described.replica_id  # pipeline, tensor, data
    changes: dict[str, Any] = {
        "key": f"{_PREFIX}.{name}.{described.key}",
        "data": data,
        "replica_id": (*described.replica_id[:2], copy),
    }
    if not isinstance(described, ShardedTensorFactory):  # which makes its tensors, with their types, of the data
        changes["dtype"] = data.dtype
    return replace(described, **changes)
