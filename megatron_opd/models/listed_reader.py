"""torch's reader of torch_dist directories, but nothing in them can name code to run (`unpickling.py`)."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_opd.models import unpickling


class ListedReader(dcp.FileSystemReader):
    """A FileSystemReader whose pickles hold listed classes only. Reads `.metadata` once."""

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self._directory = Path(directory)
        self._known: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises ValueError for metadata that are damaged or not to be trusted, and OSError."""
        if self._known is None:
            path = self._directory / ".metadata"
            with path.open("rb") as file:
                self._known = unpickling.metadata(file, path)
            if getattr(self._known, "storage_meta", None) is None:
                self._known.storage_meta = StorageMeta()
            self._known.storage_meta.load_id = self.load_id
        return self._known

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """As torch's. Raises ValueError for an entry that is not to be trusted."""
        try:
            return super().read_data(plan, _Listed(planner, self._directory))
        except pickle.UnpicklingError as error:
            raise unpickling.explained(error, f"{self._directory}: a tensor") from None


class _Listed:
    """A planner that gets bytes only after they were read with the list: torch and Megatron unpickle them without."""

    def __init__(self, planner: LoadPlanner, directory: Path) -> None:
        self._planner, self._directory = planner, directory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.storage_index.fqn
        where = f"{self._directory}: the entry {name}"
        found = unpickling.container(value, where)
        if "_extra_state" in name:
            unpickling.check_fp8_state(found, where)
        ours = io.BytesIO()
        torch.save(found, ours)  # not theirs, which a reader without the list might read differently
        ours.seek(0)
        self._planner.load_bytes(read_item, ours)
