"""Work that people wait for: what it is, how far it is, how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Callable


class Phase:
    """A piece of work under way. It may be told of progress from any thread; nothing is shown once it is over."""

    def __init__(self, what: str, total: int = 0, unit: str = "", *, show: Callable[[Phase], None]) -> None:
        """`show` is called when there is something new. Without a `total` nothing is counted."""
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self.began = time.monotonic()
        self._show = show

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        self._show(self)

    def seconds(self, now: float) -> float:
        """How long it has been going on at `now`, on the monotonic clock."""
        return now - self.began

    def text(self, now: float) -> str:
        """`evaluating: 57 of 200 prompts, 2:10 left`, with the pace so far."""
        if not self.total:
            return self.what
        text = f"{self.what}: {self.done} of {self.total} {self.unit}"
        if not 0 < self.done < self.total:
            return text
        return f"{text}, {clock_time(self.seconds(now) / self.done * (self.total - self.done))} left"


def clock_time(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
