"""How long the stages of a step take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """The seconds of each stage, the last time it ran."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Times the block as `stage`."""
        started = time.perf_counter()
        yield
        self.times[stage] = time.perf_counter() - started
