"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_opd.core import durable as disk


def write_whole(path: Path, data: bytes | str, *, durable: bool = True) -> None:
    """Write a file, text as UTF-8; it gets its name, and replaces what had it, when all of it is written.

    `durable`: when all of it is on disk; on return the name is on disk too, so that both survive a power cut.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
    if durable:
        disk.sync(path.parent)
