"""A file in memory that processes of one user share and that has no name in any file system."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def private_file(name: str) -> Iterator[str]:
    """The path of a new, empty file that only this user can open, until the block ends.

    On Linux it is in memory, and the kernel frees it with the last process that has it, however that ends.
    """
    if sys.platform != "linux":
        with tempfile.TemporaryDirectory(prefix="megatron-opd-") as folder:  # nobody else may enter it
            path = f"{folder}/{name}"
            with open(path, "wb"):
                yield path
        return
    descriptor = os.memfd_create(f"megatron-opd-{name}")
    try:
        # By way of this process, so that others need to inherit nothing, however they are started.
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)
