"""Output directories that appear whole or not at all, and the files of a model that are not weights.

A model is written to `<out>.tmp`; config.json goes there last, so that what a killed process leaves is not a model, and
the directory gets its name when all is on disk. Where `out` is a link, that is beside what it points to. Refuses an
output that is not empty, that cannot be renamed, that lies in an input (or the other way round), or that does not fit
the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from megatron_opd.core import durable

WEIGHT_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth"),
    *("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data"),
)
"""What a copy of a model directory leaves out: the weights, in whatever form."""
CHECKPOINT_FILES = ("*.distcp", ".metadata", "metadata.json", "loop.json")
"""The same for a Megatron checkpoint."""
_NOT_COPIED = (*WEIGHT_FILES, *CHECKPOINT_FILES, "*.tmp", ".git", ".cache")
_SPARE_BYTES = 64 << 20
"""Room for everything that is not weights."""


def temporary(out: str | Path) -> Path:
    """Where `out` is made."""
    return _beside(out, ".tmp")


def _beside(out: str | Path, ending: str) -> Path:
    path = Path(out).resolve()
    return path.with_name(path.name + ending)


def check_output(out: str | Path, *, inputs: list[str | Path], num_bytes: int, overwrite: bool = False) -> None:
    """Raises ValueError when a model of `num_bytes` cannot or should not be written to `out`. Writes nothing."""
    path = Path(out).resolve()
    if path.is_mount() or path == Path.cwd():
        what = "a mount point" if path.is_mount() else "the working directory"
        raise ValueError(f"{out} is {what}, which cannot be replaced; name a directory in it")
    for other in (Path(i).resolve() for i in inputs):
        if path == other or path in other.parents or other in path.parents:
            raise ValueError(f"{out} and {other} must not be the same directory, or one within the other")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{out} exists and is not a directory")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"{out} exists and is not empty; choose another directory, or give --overwrite")
        if not ((path / "config.json").is_file() or (path / ".metadata").is_file()):
            raise ValueError(f"{out} is not a model or checkpoint, so --overwrite will not remove it")
    parent = next(p for p in path.parents if p.is_dir())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{parent} cannot be written to")
    free = free_bytes(out)
    if free < num_bytes + _SPARE_BYTES:
        raise ValueError(
            f"not enough room for {out}: {free / 1e9:.2f} GB are free, {(num_bytes + _SPARE_BYTES) / 1e9:.2f} GB needed"
        )


def free_bytes(out: str | Path) -> int:
    """Free space on the disk where `out` is, or will be."""
    path = Path(out).resolve()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.is_dir())).free


def start(out: str | Path, *, like: str | Path) -> Path:
    """Make the temporary directory, with the tokenizer and whatever else lies beside the weights in `like`."""
    target = temporary(out)
    shutil.rmtree(target, ignore_errors=True)
    durable.make_directory(target.parent)
    shutil.copytree(like, target, ignore=_left_out)
    (target / "config.json").unlink()  # it comes last
    return target


def _left_out(directory: str, names: list[str]) -> set[str]:
    """The names that a copy leaves out: weights, and links to nothing. For these shutil also takes relative links, and
    the hub's cache is full of them."""
    dangling = {name for name in names if not os.path.exists(os.path.join(directory, name))}
    return dangling | shutil.ignore_patterns(*_NOT_COPIED)(directory, names)


def finish(out: str | Path, *, like: str | Path, dtype: torch.dtype) -> None:
    """Write config.json with the type of the weights, and give the directory its name once all is on disk.

    What had this name before is removed.
    """
    target = temporary(out)
    config = json.loads((Path(like) / "config.json").read_text())
    config.pop("torch_dtype", None)  # the older name of the same key
    config["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    put_in_place(target, out)


def put_in_place(made: Path, out: str | Path) -> None:
    """Give a directory beside `out` that name once all of it is on disk; what had the name is removed."""
    place, before = Path(out).resolve(), _beside(out, ".old.tmp")
    durable.sync_tree(made)
    shutil.rmtree(before, ignore_errors=True)
    if place.exists():
        place.rename(before)
    made.rename(place)
    durable.sync(place.parent)
    shutil.rmtree(before, ignore_errors=True)


def discard(out: str | Path) -> None:
    """Remove what has been written so far."""
    shutil.rmtree(temporary(out), ignore_errors=True)
