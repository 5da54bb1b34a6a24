"""Layers taken out of a Hugging Face model: a smaller one of the same family, which training has to repair.

The other weights, the tokenizer and everything else stay as they are; the layers behind a removed one move up. One
tensor is in memory at a time. The result is an ordinary model directory.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_opd.models import hf_dir, output_dir
from megatron_opd.models.architecture import read_architecture
from megatron_opd.models.safetensors_dir import TensorDir
from megatron_opd.models.weight_map import all_rules, hf_shapes

_LAYER = re.compile(r"(model\.layers\.)(\d+)(\..*)")


def size_of(model: str | Path, kept: Sequence[int]) -> int:
    """Bytes that the model's weights take with these layers alone."""
    with tempfile.TemporaryDirectory() as directory, TensorDir(model) as weights:
        (Path(directory) / "config.json").write_text(json.dumps(smaller(model, kept)))
        shapes = hf_shapes(all_rules(read_architecture(directory)))
        dtype = weights.dtype(next(iter(shapes)))
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize


def write(model: str | Path, kept: Sequence[int], out: str | Path, *, progress: Callable[[int], None]) -> None:
    """Write the model with these layers alone to the directory `out`. `progress` is told of bytes that are written."""
    with tempfile.TemporaryDirectory() as directory, TensorDir(model) as weights:
        like = Path(directory)
        (like / "config.json").write_text(json.dumps(smaller(model, kept)))
        copy_small_files(model, like)
        hf_dir.write(_told(renamed(weights, kept), progress), out, like=like)


def kept_layers(drop: Sequence[str], num_layers: int) -> list[int]:
    """The layers that stay. Raises ValueError for one that is not there, and where none stays."""
    dropped: set[int] = set()
    for text in drop:
        first, dash, last = text.partition("-")
        if not (first.isdigit() and (last.isdigit() if dash else True)):
            raise ValueError(f"--drop: {text!r} is neither a layer, such as 12, nor some, such as 4-7")
        dropped |= set(range(int(first), int(last or first) + 1))
    if beyond := sorted(layer for layer in dropped if layer >= num_layers):
        raise ValueError(f"--drop: there is no layer {beyond[0]}; the model has layers 0 to {num_layers - 1}")
    kept = [layer for layer in range(num_layers) if layer not in dropped]
    if not kept:
        raise ValueError("--drop takes all layers out; leave some")
    return kept


def smaller(model: str | Path, kept: Sequence[int]) -> dict[str, Any]:
    """config.json of the model with these layers. A list with an entry for each layer keeps theirs."""
    config: dict[str, Any] = json.loads((Path(model) / "config.json").read_text())
    before = config["num_hidden_layers"]
    lists = {key: value for key, value in config.items() if isinstance(value, list) and key.startswith("layer_")}
    picked = {key: [value[i] for i in kept] for key, value in lists.items() if len(value) == before}
    return {**config, **picked, "num_hidden_layers": len(kept)}


def renamed(weights: TensorDir, kept: Sequence[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that stay, by their new names."""
    place = {layer: i for i, layer in enumerate(kept)}
    for name in weights.names():
        found = _LAYER.fullmatch(name)
        if found is None:
            yield name, weights.read(name)
        elif int(found[2]) in place:
            yield f"{found[1]}{place[int(found[2])]}{found[3]}", weights.read(name)


def copy_small_files(model: str | Path, like: Path) -> None:
    """The tokenizer and all else but weights and config.json, into `like`."""
    config = (like / "config.json").read_bytes()
    made = output_dir.start(like / "made", like=model)
    for path in made.iterdir():
        path.rename(like / path.name)
    made.rmdir()
    (like / "config.json").write_bytes(config)


def _told(
    weights: Iterator[tuple[str, torch.Tensor]], progress: Callable[[int], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        yield name, tensor
        progress(tensor.nbytes)
