"""The files that Weights & Biases keeps while a run lives: they lie in the run's own directory, also after a kill.

Its import makes temporary directories, and the process that it starts has sockets in TMPDIR. The path of a socket may
have 107 bytes, and that of a run's directory is often longer than what is left of them. So this process keeps the
directory open, and TMPDIR names it by the number of that file.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Scratch:
    """The directory. It must stay open as long as `wandb` works."""

    def __init__(self, directory: Path) -> None:
        if "wandb" not in sys.modules:  # what a killed run has left; later it is this process's own
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block, temporary files of this process, and of those that it starts, are made there."""
        before, variable = tempfile.tempdir, os.environ.get("TMPDIR")
        tempfile.tempdir = str(self._directory)
        if sys.platform == "linux":
            os.environ["TMPDIR"] = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        try:
            yield
        finally:
            tempfile.tempdir = before
            os.environ.pop("TMPDIR", None)
            if variable is not None:
                os.environ["TMPDIR"] = variable

    def close(self) -> None:
        """Let go of it."""
        os.close(self._descriptor)
