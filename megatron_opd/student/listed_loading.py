"""Megatron's loading of torch_dist directories, but nothing in them can name code to run (`models/unpickling.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.dist_checkpointing.strategies import torch as torch_dist

from megatron_opd.models import unpickling
from megatron_opd.models.listed_reader import ListedReader


def load(state: dict[str, Any], directory: str | Path) -> dict[str, Any]:
    """The result of dist_checkpointing.load for the sharded `state`. Collective.

    Raises what that raises, torch's CheckpointException for what a rank finds damaged or not to be trusted, and
    ValueError for such a common.pt.
    """
    with _listed_reader():
        loaded: dict[str, Any] = dist_checkpointing.load(
            state,
            str(directory),
            sharded_strategy=torch_dist.TorchDistLoadShardedStrategy(),
            common_strategy=_ListedCommon(),
        )
    return loaded


def check_small_files(directory: str | Path) -> None:
    """Read what all ranks read. Raises ValueError, OSError, or CheckpointingException for a metadata.json of others."""
    dist_checkpointing.validation.verify_checkpoint_and_load_strategy(
        str(directory), torch_dist.TorchDistLoadShardedStrategy(), _ListedCommon()
    )
    _ListedCommon().load_common(directory)
    ListedReader(directory).read_metadata()


class _ListedCommon(common.TorchCommonLoadStrategy):
    """Reads common.pt with the list, whatever torch's default is by its environment variables."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        path = Path(checkpoint_dir) / common.COMMON_STATE_FNAME
        found = unpickling.container(str(path), path)
        if not isinstance(found, dict):
            raise ValueError(f"{path} is damaged: it holds {type(found).__name__}, not a mapping")
        return found


@contextmanager
def _listed_reader() -> Iterator[None]:
    """Megatron takes its reader from a function, not from who calls it."""
    saved = torch_dist._get_filesystem_reader
    torch_dist._get_filesystem_reader = lambda directory, cache_metadata=False: ListedReader(directory)
    try:
        yield
    finally:
        torch_dist._get_filesystem_reader = saved
