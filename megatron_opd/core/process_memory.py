"""Host memory: how much this process has, how much the machine can still give, and giving back what is free."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_GROUP = ("memory.max", "memory.current", "inactive_file")
"""Files of a control group with its limit and its use; the line of its memory.stat with the part of its use that are
files, which can be dropped."""
_GROUP_OF_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")

_MOST_KEPT = 1.15
"""Growth of a process that is kept, by what it has after a step that found nothing kept."""


def resident(status: str | Path = "/proc/self/status") -> int:
    """Bytes that this process has in memory; 0 where the system does not say."""
    return _field(Path(status), "VmRSS")


def peak(status: str | Path = "/proc/self/status") -> int:
    """The most bytes that this process has had; 0 where the system does not say."""
    return _field(Path(status), "VmHWM")


def available(root: str | Path = "/") -> float:
    """Bytes that the machine, and every control group around this process, still has for new processes; infinity where
    nothing is known. `root` is where proc and sys are."""
    root = Path(root)
    machine = _field(root / "proc/meminfo", "MemAvailable")
    return min([machine or math.inf, *(_left(group, names) for group, names in _groups(root))])


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The directory of our control group and of those around it. A container may see its own as the topmost one."""
    lines = []
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root / "sys/fs/cgroup", _GROUP
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", _GROUP_OF_VERSION_1
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for count in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:count]), names


def _left(group: Path, names: tuple[str, str, str]) -> float:
    """Bytes up to the limit of a control group; infinity where it has none."""
    limit, used, dropped = names
    with suppress(OSError, ValueError):  # a limit of "max" is no number
        left = int((group / limit).read_text()) - int((group / used).read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        files = sum(int(line.split()[1]) for line in lines if line.split()[0] == dropped)
        return max(left + files, 0)
    return math.inf


def give_back() -> None:
    """Return to the system what was freed. The C library keeps it for later, also where nothing like it follows."""
    with suppress(AttributeError, OSError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)


class Kept:
    """Freed memory that the C library keeps for the next step, within bounds: steps of other lengths fit worse and
    worse into its holes, and the process would grow. What was given back is made anew by the step after, once."""

    def __init__(self) -> None:
        self._usual, self._is_fresh = 0, True

    def bound(self, now: int) -> bool:
        """Call it after every step with what is `resident`. Gives back what is free, and returns True, where the
        process has grown beyond what a step by itself takes."""
        if self._is_fresh:
            self._usual, self._is_fresh = max(self._usual, now), False
        elif now > _MOST_KEPT * self._usual:
            give_back()
            self._is_fresh = True
        return self._is_fresh


def _field(path: Path, name: str) -> int:
    with suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
