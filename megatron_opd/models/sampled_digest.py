"""Whether a model directory is the one that it was, without reading all of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

_TEXTS = {".json", ".jinja", ".txt", ".model"}
_WEIGHTS = {".safetensors", ".distcp"}
_WHOLE_BYTES = 1 << 26
_BLOCKS, _BLOCK_BYTES = 16, 4096


def sampled_digest(directory: str | Path, *, has_weights: bool = True) -> str:
    """A digest of a model's files, 16 hexadecimal digits; "" where none can be read.

    Config and tokenizer count whole, weights (`has_weights`) by their names, sizes and 16 blocks of 4 KiB of each file:
    training changes every tensor, so it changes those.
    """
    digest = blake2b(digest_size=8)
    suffixes = _TEXTS | (_WEIGHTS if has_weights else set())
    paths = sorted(path for path in Path(directory).glob("*") if path.suffix in suffixes or path.name == ".metadata")
    try:
        for path in paths:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{path.name} {size}\n".encode())
                is_whole = path.suffix not in _WEIGHTS and size <= _WHOLE_BYTES
                for block in [file.read()] if is_whole else _blocks(file, size):
                    digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest() if paths else ""


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Blocks from the file's beginning to its end, at equal distances."""
    last = max(size - _BLOCK_BYTES, 0)
    for i in range(_BLOCKS):
        file.seek(last * i // (_BLOCKS - 1))
        yield file.read(_BLOCK_BYTES)
