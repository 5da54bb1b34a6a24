"""Files and directories that survive a power cut: a file's bytes are one thing on a disk, its name is another."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_UNKNOWN_THERE = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
"""Errors of file systems that cannot sync a directory; their servers keep names on their own."""


def sync(path: str | Path) -> None:
    """Return when a file's bytes, or a directory's names, are on disk. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if Path(path).is_dir():
            return  # one that may be written to and not read
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not Path(path).is_dir() or error.errno not in _UNKNOWN_THERE:
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: str | Path) -> None:
    """Return when all files of a directory and of those below it are on disk, with their names. Raises OSError."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(folder)


def make_directory(path: str | Path) -> None:
    """Make a directory and those above it where they are not there, with their names on disk. Raises OSError."""
    path = Path(path)
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)
