"""Reads and writes Megatron's torch_dist format a tensor at a time: the other side of `safetensors_dir.py`.

A torch_dist checkpoint holds whole ("global") tensors under keys, in chunks; layers, and experts within a layer, are
stacked along leading axes. `write` streams regions of such tensors to disk, each produced only when it is written;
`TorchDistDir` reads any region back. Both go through torch.distributed.checkpoint, whose layout Megatron's
dist_checkpointing shares, and neither ever holds more than one tensor. No process group is needed; under torchrun,
ranks of one write split the tensors between them.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_opd.models.listed_reader import ListedReader


@dataclass(frozen=True, slots=True)
class Region:
    """A box inside a stacked tensor: `shape` at `offset` of the tensor `key` of shape `whole`."""

    key: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""The metadata.json by which megatron.core knows the format; written here, because importing that takes seconds."""
Produce = Callable[[Region], torch.Tensor]


def write(directory: str | Path, regions: Sequence[Region], produce: Produce, dtype: torch.dtype) -> None:
    """Write the regions, calling `produce` for each when its turn comes. Collective where there is a process group.

    Every rank passes the same regions; they are split by size. Raises, on all ranks, the ValueError of `produce` on
    any of them, or OSError.
    """
    writer = dcp.FileSystemWriter(directory, thread_count=1, overwrite=False)
    plan = _StreamingSave(_mine(regions), produce, dtype)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")  # meant: one process
    try:
        dcp.save({}, storage_writer=writer, planner=plan, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:  # torch's, and not even an Exception
        raise _cause(error) from None
    if not dist.is_initialized() or dist.get_rank() == 0:
        (Path(directory) / "metadata.json").write_text(json.dumps(_BACKEND))
        torch.save({}, Path(directory) / "common.pt")  # Megatron expects the file; a bare model has nothing in it


def _cause(error: dcp.CheckpointException) -> BaseException:
    """What went wrong on the first rank that failed: torch wraps it, and hides errors of the disk behind its own."""
    known = (OSError, ValueError, KeyboardInterrupt, SystemExit)
    causes = [cause for _, (cause, _) in sorted(error.failures.items())]
    for first in causes:
        cause: BaseException | None = first
        while cause is not None:
            if isinstance(cause, known):
                return cause
            cause = cause.__cause__ or cause.__context__
    reason = str(causes[0]).splitlines()[0] if causes else "another process failed"
    return OSError(f"writing failed ({reason}); is the disk full?")


def _mine(regions: Sequence[Region]) -> list[Region]:
    """This rank's regions, largest first to the rank with the least so far."""
    if not dist.is_initialized():
        return list(regions)
    shares: list[list[Region]] = [[] for _ in range(dist.get_world_size())]
    sizes = [0] * len(shares)
    for region in sorted(regions, key=lambda r: -math.prod(r.shape)):
        lightest = sizes.index(min(sizes))
        shares[lightest].append(region)
        sizes[lightest] += math.prod(region.shape)
    return shares[dist.get_rank()]


class _StreamingSave(SavePlanner):
    """A plan whose data is made when the writer asks for it."""

    def __init__(self, regions: Sequence[Region], produce: Produce, dtype: torch.dtype) -> None:
        self.regions = {(r.key, torch.Size(r.offset)): r for r in regions}
        self.produce = produce
        self.dtype = dtype

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing: there is no state dict."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan([self._item(region) for region in self.regions.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        assert write_item.index.offset is not None
        region = self.regions[write_item.index.fqn, write_item.index.offset]
        tensor = self.produce(region).to(self.dtype)
        return tensor.reshape(region.shape)

    def _item(self, region: Region) -> WriteItem:
        offset, shape = torch.Size(region.offset), torch.Size(region.shape)
        return WriteItem(
            index=MetadataIndex(region.key, offset),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offset, shape),
                properties=TensorProperties(dtype=self.dtype),
                size=torch.Size(region.whole),
            ),
        )


class TorchDistDir:
    """The tensors of a torch_dist checkpoint by key."""

    def __init__(self, directory: str | Path) -> None:
        self.dir = Path(directory)
        self._reader = ListedReader(self.dir)
        if not is_torch_dist(self.dir):
            raise ValueError(f"{self.dir} is not a torch_dist checkpoint: there is no .metadata in it")
        try:
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            everything = metadata.state_dict_metadata.items()
        except OSError as error:
            raise ValueError(f"{self.dir / '.metadata'} cannot be read: {error.strerror}") from None
        self.tensors: dict[str, Any] = {k: v for k, v in everything if hasattr(v, "chunks")}
        """What is known of every tensor by key, that of the optimizer included."""

    def damage(self) -> list[str]:
        """Files that are absent or shorter than they were written; empty when there are none."""
        ends: dict[str, int] = {}
        for info in self._reader.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        found = []
        for name, end in sorted(ends.items()):
            path = self.dir / name
            if not path.is_file():
                found.append(f"the file {name} is missing")
            elif path.stat().st_size < end:
                found.append(f"the file {name} is cut short: {path.stat().st_size} bytes of {end}")
        return found

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._metadata(key).size)

    def dtype(self, key: str) -> torch.dtype:
        dtype: torch.dtype = self._metadata(key).properties.dtype
        return dtype

    def read(self, region: Region) -> torch.Tensor:
        """The tensor of a region, in the checkpoint's dtype. Raises ValueError when it is missing or damaged."""
        metadata = self._metadata(region.key)
        target = torch.empty(region.shape, dtype=metadata.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(region.offset), torch.Size(region.shape))
        items = create_read_items_for_chunk_list(region.key, metadata, [chunk])
        covered = sum(math.prod(item.lengths) for item in items)
        if covered != target.numel():
            found = f"{covered} of {target.numel()} values"
            raise ValueError(f"{self.dir}: {region.key} has only {found} at {region.offset}")
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (OSError, RuntimeError, EOFError, AssertionError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{self.dir}: {region.key} cannot be read: {reason}") from None
        return target

    def _metadata(self, key: str) -> Any:
        if key not in self.tensors:
            raise ValueError(f"{self.dir}: there is no tensor '{key}' in the checkpoint")
        return self.tensors[key]


class _Into(LoadPlanner):
    """Copies what is read into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        out = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            out = out.narrow(dim, start, length)
        return out

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: the tensor is a view of the target."""

    def set_up_planner(self, *_: Any, **__: Any) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError


def is_torch_dist(directory: str | Path) -> bool:
    """Whether a directory is a torch_dist checkpoint rather than a Hugging Face model."""
    return (Path(directory) / ".metadata").is_file()
