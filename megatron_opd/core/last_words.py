"""The message of a failing rank to its launcher, which prints it once, after all other output.

A rank opens the file when it starts: it may be files, memory or disk that it lacks at its end. Each has a part of it,
for a line of JSON. A limit of the size of files holds for what is written, but not for what is mapped.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_opd.core.private_file import private_file

PATH = "MEGATRON_OPD_LAST_WORDS"
"""The environment variable that tells ranks where to write."""
_LONGEST = 20_000
_ROOM = 1 << 16
"""Bytes of a rank's part, where files may be so large. What nobody writes takes no memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """Why a rank ends."""

    said: str
    """One message for people."""
    when: float
    """Seconds on the machine's monotonic clock."""
    is_lost: bool = False
    """Whether it ends only because it has lost another rank."""
    trace: str = ""
    """Where in the program it was, if the error is one that nobody has foreseen."""


@contextmanager
def collected(count: int) -> Iterator[tuple[dict[str, str], Callable[[], dict[int, Words]]]]:
    """Environment variables for `count` ranks, and a function that returns what they have said, by rank. Raises OSError
    where this process may not even have a file of a page for each."""
    with private_file("last-words") as path:
        os.truncate(path, count * _room(count))
        yield {PATH: path}, lambda: _read(Path(path).read_text(errors="replace"))


def _room(count: int) -> int:
    """Bytes for each of `count` ranks by the limit of the size of files: whole pages, which alone can be mapped."""
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if most == resource.RLIM_INFINITY:
        return _ROOM
    return min(_ROOM, max(most // count // mmap.PAGESIZE, 1) * mmap.PAGESIZE)


def _read(text: str) -> dict[int, Words]:
    found: dict[int, Words] = {}
    for line in re.findall(r"[^\0\n]+", text):
        with suppress(ValueError, TypeError, KeyError):
            words = json.loads(line)
            found.setdefault(int(words.pop("rank")), Words(**words))
    return found


class Teller:
    """This rank's side; tells nobody where there is no launcher that listens."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """Raises OSError when the launcher has gone."""
        self.rank = int(environ.get("RANK", "0"))
        path = environ.get(PATH)
        self._descriptor = None if path is None else os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._count, self._has_told = int(environ.get("WORLD_SIZE", "1")), False

    @property
    def is_heard(self) -> bool:
        """Whether a launcher listens."""
        return self._descriptor is not None

    def tell(self, said: str, *, is_lost: bool = False, trace: str = "") -> None:
        """Write it down for the launcher. The first words of a rank count."""
        if self._descriptor is None or self._has_told:
            return
        room = os.fstat(self._descriptor).st_size // self._count
        line, longest = b"", _LONGEST
        while not line or len(line) > room:
            words = Words(said=said[:longest], when=time.monotonic(), is_lost=is_lost, trace=trace[-longest:])
            line, longest = (json.dumps({"rank": self.rank, **asdict(words)}) + "\n").encode(), longest // 2
        _put(self._descriptor, line, self.rank * room, room)
        self._has_told = True


def _put(descriptor: int, line: bytes, place: int, room: int) -> None:
    """Write a line at a place, whose room is whole pages."""
    with suppress(OSError):
        if os.pwrite(descriptor, line, place) == len(line):
            return
    with mmap.mmap(descriptor, room, offset=place) as part:  # which takes another file for a moment
        part[: len(line)] = line
