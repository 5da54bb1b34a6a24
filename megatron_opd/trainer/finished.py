"""Answers that are finished, counted by the step that they are for, while the steps after it are being sampled too."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_opd.tracking.phase import Phase


class Finished:
    """Told of answers by whatever thread has them; tells the phase that waits for those of one step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count: Counter[int] = Counter()
        self._waiting: dict[int, Phase] = {}

    def add(self, step: int) -> None:
        """One more."""
        with self._lock:
            self._count[step] += 1
            if step in self._waiting:
                self._waiting[step].advance()

    @contextmanager
    def told_to(self, phase: Phase, step: int) -> Iterator[None]:
        """The phase is told of the step's answers, also of those that there are already, until the block ends."""
        with self._lock:
            self._waiting[step] = phase
            phase.advance(self._count[step])
        try:
            yield
        finally:
            with self._lock:
                del self._waiting[step], self._count[step]
