"""Reads slices of tensors from a Hugging Face directory, one file or sharded with an index, in bounded memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

_REOPEN_BYTES = 256 << 20
"""Files are read through a memory map, whose pages count as ours until it is closed; so it is, after this much."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class TensorDir:
    """The tensors of a model directory by name. Use as a context manager.

    Raises ValueError for a directory without safetensors, an index that names absent files, and damaged files.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.dir = Path(model_dir)
        self._open: dict[str, Any] = {}
        self._bytes_read = 0
        self._file_of = self._index()

    def __enter__(self) -> TensorDir:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.clear()

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> list[int]:
        return list(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor; raises ValueError for one that is not a floating-point type of 16 bits or more."""
        stored = self._slice(name).get_dtype()
        if stored not in DTYPES:
            raise ValueError(f"{self.dir}: tensor '{name}' has type {stored}; known: {', '.join(DTYPES)}")
        return DTYPES[stored]

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> torch.Tensor:
        """Tensor `name`, or only some rows (and columns) of it, on the CPU in the file's dtype."""
        if self._bytes_read > _REOPEN_BYTES:
            self._open.clear()
            self._bytes_read = 0
        part = self._slice(name)
        tensor: torch.Tensor = part[rows] if columns is None else part[rows, columns]
        # Pages are touched for whole rows, also where only some columns are wanted.
        self._bytes_read += tensor.shape[0] * math.prod(part.get_shape()[1:]) * tensor.element_size()
        return tensor

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise ValueError(f"{self.dir}: there is no tensor '{name}' in its safetensors files")
        return self._file(self._file_of[name]).get_slice(name)

    def _file(self, file: str) -> Any:
        if file not in self._open:
            path = self.dir / file
            if not path.is_file():
                raise ValueError(f"{self.dir}: the index names {file}, which does not exist")
            try:
                self._open[file] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or cut short: {error}") from None
        return self._open[file]

    def _index(self) -> dict[str, str]:
        index = self.dir / "model.safetensors.index.json"
        if index.is_file():
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{index} is not an index of safetensors: {error}") from None
        single = "model.safetensors"
        if not (self.dir / single).is_file():
            raise ValueError(f"{self.dir} has neither {single} nor {index.name}")
        return dict.fromkeys(self._file(single).keys(), single)
