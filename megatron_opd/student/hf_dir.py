"""Writes the student as an ordinary Hugging Face directory: config, tokenizer, sharded safetensors with an index.

One shard is in memory at a time. The directory gets its name only when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")


def write(
    weights: Iterator[tuple[str, torch.Tensor]], out: str | Path, *, like: str | Path, shard_bytes: int = 4 << 30
) -> None:
    """Write `weights` to `out` with every other file (config, tokenizer, …) copied from the directory `like`.

    An existing `out` is replaced, at the end.
    """
    out = Path(out)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(like, temporary, ignore=shutil.ignore_patterns(*_WEIGHTS))
    file_of: dict[str, str] = {}
    total, number, dtype = 0, 0, None
    for number, shard in enumerate(_shards(weights, shard_bytes), start=1):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, temporary / name, metadata={"format": "pt"})
        file_of.update(dict.fromkeys(shard, name))
        total += sum(t.numel() * t.element_size() for t in shard.values())
        dtype = next(iter(shard.values())).dtype
    assert dtype is not None, "a model without weights"
    _name_files(temporary, file_of, number, total)
    config = json.loads((temporary / "config.json").read_text())
    config.pop("torch_dtype", None)  # the older name of the same key
    config["dtype"] = str(dtype).removeprefix("torch.")
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def _shards(weights: Iterator[tuple[str, torch.Tensor]], shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        shard[name] = tensor.cpu().contiguous().clone()  # pieces of a bucket share storage, which safetensors refuses
        size += tensor.numel() * tensor.element_size()
        if size >= shard_bytes:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _name_files(directory: Path, file_of: dict[str, str], count: int, total: int) -> None:
    """One file keeps the plain name; several are numbered "i of n" and get an index."""
    if count == 1:
        (directory / "model-00001.safetensors").rename(directory / "model.safetensors")
        return
    final = {f"model-{i:05d}.safetensors": f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
    for old, new in final.items():
        (directory / old).rename(directory / new)
    index = {"metadata": {"total_size": total}, "weight_map": {name: final[file] for name, file in file_of.items()}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
