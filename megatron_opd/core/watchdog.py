"""Where every rank was when a run got stuck: the Python stacks of all threads, in a file a rank.

The C library's thread of `faulthandler` writes them, so they come even when no Python code can run any more.
"""

from __future__ import annotations

import faulthandler
import signal
from pathlib import Path
from types import TracebackType

_FRACTION = 0.9
"""Of the time-out of collectives: when that has passed, the first ranks fail, and with them all others are ended."""


class Watch:
    """Writes stacks to <directory>/stacks-<rank>.txt when `beat` was not called for nearly `timeout_s`, and on SIGUSR2.

    Rank 3 stuck in a collective and rank 5 in a file system look alike from outside; their stacks do not. A step, save
    or evaluation that takes so long for good reasons leaves a file too, and goes on.
    """

    def __init__(self, directory: Path, rank: int, timeout_s: float) -> None:
        self.path = directory / f"stacks-{rank:05d}.txt"
        self.after_s = _FRACTION * timeout_s

    def __enter__(self) -> Watch:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w")
        faulthandler.register(signal.SIGUSR2, file=self._file)
        self.beat()
        return self

    def beat(self) -> None:
        """This rank is getting on; the time starts again."""
        faulthandler.dump_traceback_later(self.after_s, file=self._file)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        self._file.close()
        if not self.path.stat().st_size:
            self.path.unlink()


def stacks(directory: Path) -> list[Path]:
    """The files in which something was written, in the order of ranks."""
    return sorted(path for path in directory.glob("stacks-*.txt") if path.stat().st_size)
