"""Writes a model as an ordinary Hugging Face directory: config, tokenizer, sharded safetensors with an index.

Names and shapes are known beforehand, so every tensor has its place in a file before any data exists; tensors are put
there in whatever order they come, by whichever rank has them, and none is kept. The directory gets its name only when
it is complete. The safetensors format: 8 bytes of header length, a JSON header with offsets, then the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_opd.models import output_dir
from megatron_opd.models.architecture import read_architecture
from megatron_opd.models.weight_map import all_rules, hf_shapes

_TYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True, slots=True)
class _Place:
    file: str
    offset: int
    shape: tuple[int, ...]


class HFWriter:
    """Fills a directory `out` by way of `out`.tmp. `create`, then `put` every tensor (from any rank), then `finish`."""

    def __init__(
        self,
        out: str | Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        *,
        like: str | Path,
        shard_bytes: int = 4 << 30,
    ) -> None:
        self.out = Path(out)
        self.like = like
        self.temporary = output_dir.temporary(out)
        self.dtype = dtype
        self._shards = _split(shapes, dtype, shard_bytes)
        self._headers = {name: _header(shard, dtype) for name, shard in self._shards.items()}
        self._places = {
            tensor: _Place(file, len(self._headers[file]) + start, shapes[tensor])
            for file, shard in self._shards.items()
            for tensor, (_, start, _) in shard.items()
        }
        self.missing = set(shapes)

    def create(self) -> None:
        """Lay out the files, and copy everything but weights (tokenizer, …) from the directory `like`."""
        output_dir.start(self.out, like=self.like)
        for file, header in self._headers.items():
            with (self.temporary / file).open("wb") as out:
                out.write(header)
                out.truncate(len(header) + max((stop for _, _, stop in self._shards[file].values()), default=0))

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place. Raises ValueError for one that is not in the plan or has another shape."""
        place = self._places.get(name)
        if place is None or place.shape != tuple(tensor.shape):
            raise ValueError(f"{self.out}: '{name}' of shape {list(tensor.shape)} does not belong to this model")
        data = tensor.detach().to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8).numpy()
        with (self.temporary / place.file).open("r+b") as file:
            file.seek(place.offset)
            file.write(data.data)
        self.missing.discard(name)

    def finish(self) -> None:
        """Write index and config, and give the directory its name; an existing one of that name is replaced."""
        if len(self._shards) > 1:
            total = sum(stop - start for shard in self._shards.values() for _, start, stop in shard.values())
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: place.file for name, place in sorted(self._places.items())},
            }
            (self.temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        output_dir.finish(self.out, like=self.like, dtype=self.dtype)


def write(
    weights: Iterable[tuple[str, torch.Tensor]], out: str | Path, *, like: str | Path, shard_bytes: int = 4 << 30
) -> None:
    """Write all weights of a model of the architecture of `like` to `out`, with the other files of that directory.

    Raises ValueError when a weight is missing, unknown, or has another shape than the architecture says.
    """
    shapes = hf_shapes(all_rules(read_architecture(like)))
    writer: HFWriter | None = None
    try:
        for name, tensor in weights:
            if writer is None:
                writer = HFWriter(out, shapes, tensor.dtype, like=like, shard_bytes=shard_bytes)
                writer.create()
            writer.put(name, tensor)
        missing = writer.missing if writer else set(shapes)
        if writer is None or missing:
            raise ValueError(f"{out}: missing weights: {', '.join(sorted(missing)[:5])}")
        writer.finish()
    except BaseException:
        output_dir.discard(out)
        raise


_Shard = dict[str, tuple[tuple[int, ...], int, int]]
"""By tensor: shape, first byte, byte after the last, counted from the end of the header."""


def _split(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int) -> dict[str, _Shard]:
    """Tensors by file, in the given order; a file is closed once it holds `shard_bytes`."""
    shards: list[_Shard] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size >= shard_bytes:
            shards.append({})
            size = 0
        num_bytes = math.prod(shape) * dtype.itemsize
        shards[-1][name] = (shape, size, size + num_bytes)
        size += num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def _header(shard: _Shard, dtype: torch.dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, (shape, start, stop) in shard.items():
        entries[name] = {"dtype": _TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned
    return len(text).to_bytes(8, "little") + text
