"""Reads slices of tensors from a Hugging Face directory, one file or sharded with an index, in bounded memory.

Plain reads into the result, no memory map: mapped pages count as memory of the process for as long as the map lives.
Refuses files that are absent, cut short or not safetensors. The format: 8 bytes of header length, a JSON header with
type, shape and place of every tensor, then the data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

READ_BYTES = 64 << 20
"""What is read at once where only some columns of a tensor are wanted."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@dataclass(frozen=True, slots=True)
class _Entry:
    file: str
    kind: str
    shape: list[int]
    start: int
    stop: int


class TensorDir:
    """The tensors of a model directory by name. Use as a context manager.

    Raises ValueError for a directory without safetensors, an index that names absent files, and damaged files.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.dir = Path(model_dir)
        self._entries: dict[str, dict[str, _Entry]] = {}
        self._open: dict[str, BinaryIO] = {}
        self._file_of = self._index()

    def __enter__(self) -> TensorDir:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> list[int]:
        return list(self._entry(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor; raises ValueError for one that is not a floating-point type of 16 bits or more."""
        stored = self._entry(name).kind
        if stored not in DTYPES:
            raise ValueError(f"{self.dir}: tensor '{name}' has type {stored}; known: {', '.join(DTYPES)}")
        return DTYPES[stored]

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> torch.Tensor:
        """Tensor `name`, or only some rows (and columns) of it, on the CPU in the file's dtype."""
        shape = self.shape(name)
        first, last, _ = rows.indices(shape[0])
        if columns is None:
            return self._rows(name, first, last)
        width = len(range(*columns.indices(shape[1])))
        wanted = torch.empty(last - first, width, dtype=self.dtype(name))
        at_once = max(READ_BYTES // (shape[1] * wanted.element_size()), 1)
        for start in range(first, last, at_once):
            stop = min(start + at_once, last)
            wanted[start - first : stop - first] = self._rows(name, start, stop)[:, columns]
        return wanted

    def _rows(self, name: str, first: int, last: int) -> torch.Tensor:
        entry = self._entry(name)
        tensor = torch.empty([max(last - first, 0), *entry.shape[1:]], dtype=self.dtype(name))
        row_bytes = math.prod(entry.shape[1:]) * tensor.element_size()
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        if entry.file not in self._open:
            self._open[entry.file] = (self.dir / entry.file).open("rb", buffering=0)
        file, done = self._open[entry.file], 0
        file.seek(entry.start + first * row_bytes)
        while done < len(view):
            count = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise ValueError(f"{self.dir / entry.file} is damaged or cut short: it ends within '{name}'")
            done += count
        return tensor

    def _entry(self, name: str) -> _Entry:
        if name not in self._file_of:
            raise ValueError(f"{self.dir}: there is no tensor '{name}' in its safetensors files")
        file = self._file_of[name]
        if name not in self._header(file):
            raise ValueError(f"{self.dir}: the index says that '{name}' is in {file}, but it is not")
        return self._header(file)[name]

    def _header(self, file: str) -> dict[str, _Entry]:
        if file not in self._entries:
            path = self.dir / file
            if not path.is_file():
                raise ValueError(f"{self.dir}: the index names {file}, which does not exist")
            try:
                self._entries[file] = _read_header(path)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is damaged or cut short: {error}") from None
        return self._entries[file]

    def _index(self) -> dict[str, str]:
        index = self.dir / "model.safetensors.index.json"
        if index.is_file():
            try:
                named = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index} is not an index of safetensors: {error}") from None
            if wrong := [file for file in named.values() if not isinstance(file, str)]:
                raise ValueError(f"{index} is not an index of safetensors: {wrong[0]!r} is not a file name")
            return named
        single = "model.safetensors"
        if not (self.dir / single).is_file():
            raise ValueError(f"{self.dir} has neither {single} nor {index.name} (no other formats are read)")
        return dict.fromkeys(self._header(single), single)


def _read_header(path: Path) -> dict[str, _Entry]:
    """Every tensor of a file. Raises ValueError (or what JSON of another form leads to) for anything inconsistent."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"its header would be {length} bytes, the file has {size}")
        header: dict[str, Any] = json.loads(file.read(length))
    entries = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        start, stop = (8 + length + offset for offset in about["data_offsets"])
        entry = _Entry(path.name, about["dtype"], about["shape"], start, stop)
        if stop > size:
            raise ValueError(f"'{name}' would end at byte {stop}, the file has {size}")
        if entry.kind in DTYPES and stop - start != math.prod(entry.shape) * DTYPES[entry.kind].itemsize:
            raise ValueError(f"'{name}' has {stop - start} bytes, which is not what its shape {entry.shape} takes")
        entries[name] = entry
    return entries
