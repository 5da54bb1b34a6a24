"""Who this rank is and whom it talks to, as a value that is passed around (no globals).

`share` is how a replica's leader does something alone (talk to an engine) and its peers get the result, or the
same error. Ranks that only wait do so in a gloo group with the run's own time-out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")


class PeerError(RuntimeError):
    """Another rank of the replica failed; the message is its message."""


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone or too late (gloo has no exception of its own)."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """This rank's place in the tensor x context x data x pipeline grid, and the groups it belongs to."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    expert_rank: int
    expert_size: int
    sequence: bool
    """Whether activations between matrices are split over the tensor-parallel ranks."""
    length_multiple: int
    """See ParallelConfig."""
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    """The ranks that have the parts of the same sequences."""
    data_group: dist.ProcessGroup
    reduction_group: dist.ProcessGroup
    """The ranks with copies of the same weights, data x context: gradients are summed over these."""
    expert_group: dist.ProcessGroup
    """The ranks that share the experts of a mixture."""
    replica_group: dist.ProcessGroup
    """The tensor x pipeline x context ranks of one data-parallel replica, over gloo: objects, not activations."""
    world_group: dist.ProcessGroup
    """All ranks, over gloo."""

    @property
    def is_main(self) -> bool:
        """The one rank that writes logs."""
        return self.rank == 0

    @property
    def is_leader(self) -> bool:
        """The one rank of its replica that owns the engine."""
        return self.tensor_rank == 0 and self.pipeline_rank == 0 and self.context_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether the loss is computed here."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def counts_whole(self) -> bool:
        """Whether this rank counts in sums, among those that hold the same micro-batches of their replica whole."""
        return self.is_last_stage and self.tensor_rank == 0 and self.context_rank == 0

    def share(self, compute: Callable[[], _T]) -> _T:
        """Run `compute` on the replica's leader and return its result on every rank of the replica.

        If it raises, the leader re-raises its own exception and the others raise PeerError with the same message.
        """
        return _share(compute, self.replica_group, self.is_leader)

    def share_world(self, compute: Callable[[], _T]) -> _T:
        """Like `share`, from rank 0 to everybody."""
        return _share(compute, self.world_group, self.is_main)

    def gather_world(self, value: _T) -> list[_T]:
        """Every rank's value, in the order of ranks, on every rank. Collective over all ranks."""
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, value, group=self.world_group)
        return everyone

    def any_world(self, flag: bool) -> bool:
        """Whether any rank says so, on every rank: one number over gloo. Collective over all ranks."""
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.world_group)
        return bool(flags)

    def gather_leaders(self, value: _T) -> list[_T]:
        """Every replica's value, in the order of replicas, on every rank. Collective over all ranks."""
        everyone = self.gather_world((self.is_leader, self.data_rank, value))
        leaders = {data_rank: value for is_leader, data_rank, value in everyone if is_leader}
        return [leaders[data_rank] for data_rank in sorted(leaders)]


def _share(compute: Callable[[], _T], group: dist.ProcessGroup, is_source: bool) -> _T:
    source = dist.get_global_rank(group, 0)
    if not is_source:
        box: list[Any] = [None, None]
        dist.broadcast_object_list(box, src=source, group=group)
        result, failure = box
        if failure is not None:
            raise PeerError(failure)
        return result
    try:
        result = compute()
    except Exception as error:
        dist.broadcast_object_list([None, f"{type(error).__name__}: {error}"], src=source, group=group)
        raise
    dist.broadcast_object_list([result, None], src=source, group=group)
    return result
