"""The message of a failing rank to its launcher, which prints it once, after all other output.

A rank opens the file when it starts: it may be files, memory or disk that it lacks at its end. Lines of JSON, which
ranks append whole.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_opd.core.private_file import private_file

PATH = "MEGATRON_OPD_LAST_WORDS"
"""The environment variable that tells ranks where to write."""
_LONGEST = 20_000


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
def collected() -> Iterator[tuple[dict[str, str], Callable[[], dict[int, Words]]]]:
    """Environment variables for ranks, and a function that returns what they have said, by rank."""
    with private_file("last-words") as path:
        yield {PATH: path}, lambda: _read(Path(path).read_text(errors="replace"))


def _read(text: str) -> dict[int, Words]:
    found: dict[int, Words] = {}
    for line in text.splitlines():
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
        self._descriptor = None if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    @property
    def is_heard(self) -> bool:
        """Whether a launcher listens."""
        return self._descriptor is not None

    def tell(self, said: str, *, is_lost: bool = False, trace: str = "") -> None:
        """Write it down for the launcher. The first words of a rank count."""
        if self._descriptor is not None:
            words = Words(said=said[:_LONGEST], when=time.monotonic(), is_lost=is_lost, trace=trace[-_LONGEST:])
            os.write(self._descriptor, (json.dumps({"rank": self.rank, **asdict(words)}) + "\n").encode())
