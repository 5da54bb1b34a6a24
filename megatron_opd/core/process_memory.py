"""Host memory: how much this process has, how much the machine can still give, and giving back what is free."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path


def resident(status: str | Path = "/proc/self/status") -> int:
    """Bytes that this process has in memory; 0 where the system does not say."""
    return _field(Path(status), "VmRSS")


def peak(status: str | Path = "/proc/self/status") -> int:
    """The most bytes that this process has had; 0 where the system does not say."""
    return _field(Path(status), "VmHWM")


def give_back() -> None:
    """Return to the system what was freed. The C library keeps it for later, also where nothing like it follows."""
    with suppress(AttributeError, OSError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)


def _field(path: Path, name: str) -> int:
    with suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
