"""The files of a checkpoint: on disk, counted and hashed when they are saved, compared before they are loaded.

The ranks share the work: at a save everyone has the files that it wrote, which are still in its machine's memory, and
before a load they are dealt out by size. A file is hashed in pieces, on several threads.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_opd.core import durable
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.run_dir import MARKER

_PIECE_BYTES = 64 << 20
"""Hashes depend on it: a file's is the hash of those of its pieces."""
_READ_BYTES = 1 << 20
_THREADS = 4
"""A rank's, of which a machine has several."""
_DATA_FILE = re.compile(r"__(\d+)_\d+\.distcp")

Files = dict[str, dict[str, Any]]
"""By name: `bytes`, the size, and `blake2b`, the hash in hexadecimal digits."""


def parsed(found: Any) -> Files | None:
    """What loop.json says of the files; None for what no save writes."""
    if not isinstance(found, dict) or not found:
        return None
    for name, file in found.items():
        if not isinstance(file, dict) or "/" in name or not isinstance(file.get("bytes"), int):
            return None
        if not isinstance(file.get("blake2b"), str):
            return None
    return found


def record(checkpoint: Path, parallel: Parallel) -> tuple[Files, list[str]]:
    """Have all files of a directory on disk, and what they are, on every rank; and why that failed. Collective.

    What lies in directories below it is left out.
    """
    found: Files = {}
    failed = []
    try:
        for name in sorted(path.name for path in checkpoint.iterdir() if path.is_file()):
            if _writer(name, parallel.world_size) == parallel.rank:
                durable.sync(checkpoint / name)
                found[name] = {"bytes": (checkpoint / name).stat().st_size, "blake2b": blake2b(checkpoint / name)}
    except OSError as error:
        failed = [f"{error.strerror or error} (rank {parallel.rank})"]
    everyone = parallel.gather_world((found, failed))
    files = {name: file for theirs, _ in everyone for name, file in theirs.items()}
    return dict(sorted(files.items())), [line for _, lines in everyone for line in lines]


def differences(checkpoint: Path, files: Files, parallel: Parallel, *, contents: bool) -> list[str]:
    """Where a directory is not as `files` has it, a line a file, on every rank; sizes only without `contents`.

    Collective, with the same `files` on all ranks.
    """
    mine = _share(files, parallel.rank, parallel.world_size)
    found = [line for name in mine if (line := _difference(checkpoint / name, files[name], contents))]
    return sorted(line for lines in parallel.gather_world(found) for line in lines)


def strangers(checkpoint: Path, files: Files) -> list[str]:
    """What lies in the directory and is none of its files; nothing reads it."""
    return sorted(path.name for path in checkpoint.iterdir() if path.name not in {*files, MARKER})


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


def _difference(path: Path, file: dict[str, Any], contents: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != file["bytes"]:
            return f"{path.name} has {size} bytes, not the {file['bytes']} that were written"
        if contents and blake2b(path) != file["blake2b"]:
            return f"{path.name} is not as it was written, by its hash"
    except FileNotFoundError:
        return f"there is no {path.name} in it"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def _writer(name: str, world_size: int) -> int:
    """The rank that wrote a file: data files have its number, and rank 0 writes the others."""
    named = _DATA_FILE.fullmatch(name)
    rank = int(named[1]) if named else 0
    return rank if rank < world_size else 0


def _share(files: Files, rank: int, world_size: int) -> Sequence[str]:
    """A rank's files, the largest dealt first, each to the rank that has the least."""
    shares: list[list[str]] = [[] for _ in range(world_size)]
    sizes = [0] * world_size
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        least = sizes.index(min(sizes))
        shares[least].append(name)
        sizes[least] += files[name]["bytes"]
    return shares[rank]
