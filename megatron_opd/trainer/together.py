"""Ranks that stop together when servers are lost, and the seconds that each stage of a step takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_opd.core.parallel import Parallel, PeerError
from megatron_opd.core.protocols import Lost


class ServersLost(ValueError):
    """No server is left that could do what the run needs; every rank raises it at the same place."""


class Together:
    """Guards work for which some ranks talk to servers."""

    def __init__(self, parallel: Parallel, *, is_served: bool) -> None:
        """`is_served`: whether the run depends on servers at all; without them nothing is exchanged."""
        self.parallel, self.is_served = parallel, is_served

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A block that ends on all ranks together: when one rank raises Lost, every rank raises ServersLost.

        So the end of the block is a barrier, and no rank waits for one that has stopped. Collective over all ranks.
        """
        if not self.is_served:
            yield
            return
        error, is_lost = None, False
        try:
            yield
        except Lost as caught:
            error, is_lost = caught, True
        except Exception as caught:
            error = caught
        said = None if error is None else (is_lost, str(error))
        failures = [failure for failure in self.parallel.gather_world(said) if failure]
        if failures:
            is_lost, message = max(failures)
            if is_lost:
                raise ServersLost(message) from error
            raise error or PeerError(message)


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
