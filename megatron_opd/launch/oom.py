"""Whether the kernel has killed processes for want of memory meanwhile: it counts them, and says no more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


class Kills:
    """Counts from its construction on, over this machine."""

    def __init__(self, root: str | Path = "/") -> None:
        """`root` is where proc and sys are."""
        self._root = Path(root)
        self._before = self._count()

    def since(self) -> bool | None:
        """Whether there was one; None where this kernel does not tell."""
        now = self._count()
        return None if now is None or self._before is None else now > self._before

    def _count(self) -> int | None:
        counts = list(self._counts())
        return sum(counts) if counts else None

    def _counts(self) -> Iterator[int]:
        """The machine's own, and that of our control group: in a container one of them may be all that is seen."""
        for name in ("proc/vmstat", *self._events()):
            try:
                text = (self._root / name).read_text()
            except OSError:
                continue
            yield from (int(number) for number in re.findall(r"^oom_kill (\d+)$", text, re.MULTILINE))

    def _events(self) -> Iterator[str]:
        try:
            groups = (self._root / "proc/self/cgroup").read_text().splitlines()
        except OSError:
            return
        for line in groups:
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield f"sys/fs/cgroup{path.rstrip('/')}/memory.events"
            elif controllers == "memory":
                yield f"sys/fs/cgroup/memory{path.rstrip('/')}/memory.oom_control"
