"""The files of a checkpoint by name, with size and hash, as its loop.json has them; hashed in pieces, by threads."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_PIECE_BYTES = 64 << 20
"""Hashes depend on it: a file's is the hash of those of its pieces."""
_READ_BYTES = 1 << 20
_THREADS = 4
"""A rank's, of which a machine has several."""

KEY = "files"
"""Their key in loop.json. Checkpoints did not always have it."""
Files = dict[str, dict[str, Any]]
"""By name: `bytes`, the size, and `blake2b`, the hash in hexadecimal digits, or None where none was computed."""


def parsed(found: Any) -> Files | None:
    """The files as loop.json lists them; None for a list that no save writes."""
    if not isinstance(found, dict) or not found:
        return None
    for name, file in found.items():
        if not isinstance(file, dict) or "/" in name or not isinstance(file.get("bytes"), int):
            return None
        if not isinstance(file.get("blake2b", 0), str | None):
            return None
    return found


def measured(path: Path, *, contents: bool = True) -> dict[str, Any]:
    """Size and hash of a file; its size only without `contents`. Raises OSError."""
    return {"bytes": path.stat().st_size, "blake2b": blake2b(path) if contents else None}


def difference(path: Path, file: dict[str, Any], *, contents: bool = True) -> str | None:
    """Why a file is not what `file` says, None when it is; by its size only without `contents`."""
    try:
        size = path.stat().st_size
        if size != file["bytes"]:
            return f"{path.name} has {size} bytes, not the {file['bytes']} that were written"
        if contents and file["blake2b"] is not None and blake2b(path) != file["blake2b"]:
            return f"{path.name} is not as it was written, by its hash"
    except FileNotFoundError:
        return f"there is no {path.name} in it"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def share(files: Files, rank: int, world_size: int) -> list[str]:
    """A rank's files, the largest dealt first, each to the rank that has the least."""
    shares: list[list[str]] = [[] for _ in range(world_size)]
    sizes = [0] * world_size
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        least = sizes.index(min(sizes))
        shares[least].append(name)
        sizes[least] += files[name]["bytes"]
    return shares[rank]


def blake2b(path: Path, threads: int = _THREADS) -> str:
    """The hash of a file: that of the hashes of its pieces. Raises OSError."""
    starts = range(0, max(path.stat().st_size, 1), _PIECE_BYTES)
    with ThreadPoolExecutor(threads) as pool:
        pieces = pool.map(lambda start: _piece(path, start), starts)
        return hashlib.blake2b(b"".join(pieces), digest_size=32).hexdigest()


def _piece(path: Path, start: int) -> bytes:
    hashed, left = hashlib.blake2b(digest_size=32), _PIECE_BYTES
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(buffer[: min(left, _READ_BYTES)])):
            hashed.update(buffer[:count])
            left -= count
    return hashed.digest()
