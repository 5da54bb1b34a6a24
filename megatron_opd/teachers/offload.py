"""Teachers whose weights wait in host memory: while one scores, the next one's are on their way to the GPU.

Who comes when is decided here, without a GPU in sight; the copies are functions (`pinned.py` has those of CUDA). At
most two models are on the GPU: the one that scores, and the next. With `teachers.N.prefetch` off it is one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class OffloadedWeights:
    """The weights of one model."""

    fetch: Callable[[], None]
    """Begin to copy them to the GPU; returns at once."""
    wait: Callable[[], None]
    """Let whatever is computed from here on wait until they have arrived."""
    drop: Callable[[], None]
    """Give their GPU memory back, for what comes after all that was computed so far."""
    ahead: bool = True
    """Whether they may be fetched while another model computes."""
    is_fetched: bool = False

    def start(self) -> None:
        """Fetch them, unless they are on their way or there."""
        if not self.is_fetched:
            self.fetch()
            self.is_fetched = True

    def release(self) -> None:
        """Drop them where they were fetched."""
        if self.is_fetched:
            self.drop()
            self.is_fetched = False

    @contextmanager
    def there(self) -> Iterator[None]:
        """The weights can be used; who had them fetched before keeps them."""
        was_fetched = self.is_fetched
        self.start()
        try:
            self.wait()
            yield
        finally:
            if not was_fetched:
                self.release()


def in_turn(models: Sequence[OffloadedWeights | None]) -> Generator[int, None, None]:
    """The numbers of the models, each when it is to compute; None: one that needs nothing fetched.

    Before a model computes, the copy of the next one that needs it is begun. Behind it the model gives its memory back,
    so the copy after that waits for this computation and finds the memory free. Whoever stops early leaves none there.
    """
    try:
        for n, own in enumerate(models):
            if own is not None:
                own.start()
            following = next((weights for weights in models[n + 1 :] if weights is not None), None)
            if following is not None and following.ahead:
                following.start()
            yield n
            if own is not None:
                own.release()
    finally:
        for weights in models:
            if weights is not None:
                weights.release()
