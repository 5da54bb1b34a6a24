"""Progress of work that is counted in bytes, such as conversions."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_opd.core import torchrun

_LINE_EVERY_S = 5.0
"""Time between lines of progress where there is no terminal."""


def gigabytes(num_bytes: float) -> str:
    """A size for people."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


class BytesBar:
    """Progress with an ETA: a bar on a terminal, a line now and then elsewhere, nothing on ranks other than 0.

    Call it with the bytes that are done.
    """

    def __init__(self, what: str, total: float) -> None:
        self.what, self.total, self.done = what, max(total, 1.0), 0.0
        self.started = self.said = time.monotonic()
        console = Console(stderr=True)
        self.bar: Progress | None = None
        if torchrun.is_main() and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self.bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task(what, total=self.total)

    def __enter__(self) -> BytesBar:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            if kind is None:
                self.bar.update(self.task, completed=self.total)
            self.bar.stop()
        elif torchrun.is_main() and kind is None:
            self._line(f"done in {time.monotonic() - self.started:.1f} s")

    def __call__(self, num_bytes: float) -> None:
        self.done = min(self.done + num_bytes, self.total)
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
        elif torchrun.is_main() and now - self.said > _LINE_EVERY_S:
            self.said = now
            left = (now - self.started) * (self.total / self.done - 1)
            self._line(f"{100 * self.done / self.total:3.0f} % of {gigabytes(self.total)}, {left:.0f} s left")

    def _line(self, text: str) -> None:
        print(f"{self.what}: {text}", file=sys.stderr, flush=True)
