"""The files of a checkpoint: on disk, counted and hashed when they are saved, compared before they are loaded.

The ranks share the work: at a save everyone has the files that it wrote, which are still in its machine's memory, and
before a load they are dealt out by size.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_opd.core import durable, hashed_files
from megatron_opd.core.hashed_files import Files
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.run_dir import MARKER

_DATA_FILE = re.compile(r"__(\d+)_\d+\.distcp")


def record(checkpoint: Path, parallel: Parallel, *, contents: bool) -> tuple[Files, list[str]]:
    """Have all files of a directory on disk, and what they are, on every rank; and why that failed. Collective.

    Without `contents` nothing is hashed. What lies in directories below it is left out.
    """
    found: Files = {}
    failed = []
    try:
        for name in sorted(path.name for path in checkpoint.iterdir() if path.is_file()):
            if _writer(name, parallel.world_size) == parallel.rank:
                durable.sync(checkpoint / name)
                found[name] = hashed_files.measured(checkpoint / name, contents=contents)
    except OSError as error:
        failed = [f"{error.strerror or error} (rank {parallel.rank})"]
    everyone = parallel.gather_world((found, failed))
    files = {name: file for theirs, _ in everyone for name, file in theirs.items()}
    return dict(sorted(files.items())), [line for _, lines in everyone for line in lines]


def differences(checkpoint: Path, files: Files, parallel: Parallel, *, contents: bool) -> list[str]:
    """Where a directory is not as `files` has it, a line a file, on every rank; sizes only without `contents`.

    Collective, with the same `files` on all ranks.
    """
    mine = hashed_files.share(files, parallel.rank, parallel.world_size)
    lines = [hashed_files.difference(checkpoint / name, files[name], contents=contents) for name in mine]
    everyone = parallel.gather_world([line for line in lines if line])
    return sorted(line for theirs in everyone for line in theirs)


def strangers(checkpoint: Path, files: Files) -> list[str]:
    """Names in the directory that are none of its files; nothing reads them."""
    return sorted(path.name for path in checkpoint.iterdir() if path.name not in {*files, MARKER})


def _writer(name: str, world_size: int) -> int:
    """The rank that wrote a file: data files have its number, and rank 0 writes the others."""
    named = _DATA_FILE.fullmatch(name)
    rank = int(named[1]) if named else 0
    return rank if rank < world_size else 0
