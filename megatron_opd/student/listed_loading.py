"""Megatron's loading of torch_dist directories, but nothing in them can name code to run (`models/unpickling.py`)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.dist_checkpointing.strategies import torch as torch_dist

from megatron_opd.core import stacks
from megatron_opd.models import unpickling
from megatron_opd.models.listed_reader import ListedReader

_COMMON = "common_state/shard_0_1"
"""The entry of what all ranks share; some versions of megatron-core wrote a file of its own instead."""


def load(state: dict[str, Any], directory: str | Path) -> dict[str, Any]:
    """The result of dist_checkpointing.load for the sharded `state`. Collective.

    Raises what that raises, on all ranks torch's CheckpointException for what one finds damaged or not to be trusted,
    and ValueError for such a common.pt.
    """
    loaded: dict[str, Any] = {}
    failures: dict[int, Any] = {}
    try:
        with _listed_reader():
            how = torch_dist.TorchDistLoadShardedStrategy()
            loaded = dist_checkpointing.load(state, str(directory), sharded_strategy=how)
    except dcp.CheckpointException as error:  # torch's, and not even an Exception
        failures = error.failures
    if stacks.here().loads_apart:
        failures = _of_all(failures)
    if failures:
        raise dcp.CheckpointException("load", failures)
    return loaded


def _of_all(failures: dict[int, Any]) -> dict[int, Any]:
    """The first failure of each rank, by rank. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, next(iter(failures.values()), None))
    return {rank: failure for rank, failure in enumerate(everyone) if failure}


def check_small_files(directory: str | Path) -> None:
    """Read what all ranks read. Raises ValueError, OSError, or CheckpointingException for a metadata.json of others."""
    attrgetter(stacks.here().checks_kind)(dist_checkpointing)(str(directory))
    _load_common(directory)
    ListedReader(directory).read_metadata()


def has_common(directory: str | Path) -> bool:
    """Whether there is what all ranks share, in a file of its own or as an entry. Raises ValueError and OSError."""
    own = Path(directory) / common.COMMON_STATE_FNAME
    return own.is_file() or _COMMON in ListedReader(directory).read_metadata().state_dict_metadata


def _load_common(directory: str | Path) -> dict[str, Any]:
    """The state that all ranks share, read with the list, whatever torch's default is by its environment variables."""
    path = Path(directory) / common.COMMON_STATE_FNAME
    if path.is_file():
        found = unpickling.container(str(path), path)
    else:
        path = Path(directory) / _COMMON
        found = _entry(directory, path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds {type(found).__name__}, not a mapping")
    return found


def _entry(directory: str | Path, path: Path) -> Any:
    """The object that megatron-core files as a list of one."""
    state: dict[str, Any] = {_COMMON: io.BytesIO()}
    try:
        dcp.load(state, storage_reader=ListedReader(directory), no_dist=True)
    except dcp.CheckpointException as error:
        raise next(cause for cause, _ in error.failures.values()) from None
    found = state[_COMMON]
    if isinstance(found, io.BytesIO):
        found.seek(0)
        found = unpickling.container(found, path)
    return found[0] if isinstance(found, list) and len(found) == 1 else found


@contextmanager
def _listed_reader() -> Iterator[None]:
    """Megatron takes its readers from functions, not from who calls it."""
    owner, _, name = stacks.here().reads_common.rpartition(".")
    changed = [(torch_dist, "_get_filesystem_reader"), (attrgetter(owner)(dist_checkpointing), name)]
    ours = [lambda directory, *_, **__: ListedReader(directory), lambda *args: _load_common(args[-1])]
    saved = [getattr(where, what) for where, what in changed]
    for (where, what), function in zip(changed, ours, strict=True):
        setattr(where, what, function)
    try:
        yield
    finally:
        for (where, what), function in zip(changed, saved, strict=True):
            setattr(where, what, function)
