"""Megatron's writing of torch_dist files, in this process, with no copy of more than a tensor at a time.

Megatron writes in processes that it forks, made for saves in the background, and for those it first copies a rank's
whole share to host memory; on a CPU it copies every tensor that is a view, and weights are views of one buffer. Our
saves are waited for. A fork may also hang where other threads hold locks, or for good when the forked process is
killed. So this process writes, straight from where the tensors are; one on a GPU is fetched when its turn comes.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint import CheckpointException

from megatron_opd.core import stacks


def stand_alone(state: dict[str, Any]) -> None:
    """Have every tensor of a sharded state in a storage of its own size, in the same memory: of a view, torch would
    write all that it is a view of, so Megatron copies it."""
    apply_factories(state)
    for sharded in nested_values(state):
        if isinstance(sharded, ShardedTensor):
            sharded.data = _alone(sharded.data)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.numel() == 0:
        return tensor
    numbers = tensor.reshape(-1).view(torch.uint8).numpy()
    return torch.from_numpy(numbers).view(tensor.dtype).view(tensor.shape)


@contextmanager
def writing(second_names: Mapping[str, str]) -> Iterator[None]:
    """Within, dist_checkpointing.save writes as this module says. Tensors named in `second_names` are written once and
    listed under both names."""
    writer, method = filesystem_async.FileSystemWriterAsync, stacks.here().writes_files
    changes = {
        method: staticmethod(_write_here),
        "preload_tensors": staticmethod(lambda buckets, *_, **__: buckets),
        "finish": _finish(writer.finish, second_names),
    }
    saved = {name: writer.__dict__[name] for name in changes}, filesystem_async._results_queue
    for name, function in changes.items():
        setattr(writer, name, function)
    filesystem_async._results_queue = queue.Queue()  # otherwise one of a manager process
    try:
        yield
    finally:
        for name, function in saved[0].items():
            setattr(writer, name, function)
        filesystem_async._results_queue = saved[1]


def _write_here(transforms: list[Any], _: bool, rank: int, files: list[Any], results: queue.Queue[Any]) -> None:
    """Write this rank's files; results gets what Megatron expects: {number of the file: its entries} or an error."""
    done: queue.Queue[Any] = queue.Queue()
    written = {}
    for i, (path, name, (objects, tensors)) in enumerate(files):
        pending: queue.Queue[int] = queue.Queue()
        pending.put(i)
        file = path, name, (objects, _Fetched(tensors))
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, i, file, done, pending, use_fsync=True)
        _, outcome = done.get()
        if isinstance(outcome, Exception):
            results.put(OSError(f"{reason(outcome)} (rank {rank})"))
            return
        written[i] = outcome
    results.put(written)


@dataclass(frozen=True, slots=True)
class _Fetched:
    """Entries of a file with their tensors, in host memory when it is their turn."""

    tensors: list[tuple[Any, torch.Tensor]]

    def __iter__(self) -> Iterator[tuple[Any, torch.Tensor]]:
        for entry, tensor in self.tensors:
            yield entry, tensor.cpu()


def _finish(original: Any, second_names: Mapping[str, str]) -> Any:
    """Megatron's method that writes `.metadata` on rank 0, which then has the second names too."""

    def finish(self: Any, metadata: Any, results: list[list[Any]]) -> None:
        known = metadata.state_dict_metadata
        known.update({second: known[name] for name, second in second_names.items()})
        again = [
            replace(result, index=replace(result.index, fqn=second_names[result.index.fqn]))
            for rank in results
            for result in rank
            if result.index.fqn in second_names
        ]
        original(self, metadata, [*results, again])

    return finish


def reason(error: BaseException) -> str:
    """One line: what the operating system said, where torch's own complaint about it hides that."""
    if isinstance(error, CheckpointException):
        causes = [cause for _, (cause, _) in sorted(error.failures.items())]
        return reason(causes[0]).removeprefix("Worker failure: ") if causes else "another rank failed"
    cause: BaseException | None = error
    while cause and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return (str(cause or error).strip() or type(error).__name__).splitlines()[0]
