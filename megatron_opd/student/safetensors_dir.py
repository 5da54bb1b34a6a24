"""Reads slices of tensors from a Hugging Face directory, one file or sharded with an index, without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


class TensorDir:
    """The tensors of a model directory by name. Use as a context manager."""

    def __init__(self, model_dir: str | Path) -> None:
        self.dir = Path(model_dir)
        self._file_of = self._index()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> TensorDir:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.clear()

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> list[int]:
        return list(self._slice(name).get_shape())

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> torch.Tensor:
        """Tensor `name`, or only some rows (and columns) of it, on the CPU in the file's dtype."""
        part = self._slice(name)
        return part[rows] if columns is None else part[rows, columns]

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
            return dict(json.loads(index.read_text())["weight_map"])
        single = "model.safetensors"
        if not (self.dir / single).is_file():
            raise ValueError(f"{self.dir} has neither {single} nor {index.name}")
        self._file_of, self._open = {}, {}
        return dict.fromkeys(self._file(single).keys(), single)
