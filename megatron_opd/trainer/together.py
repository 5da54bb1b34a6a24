"""Ranks that stop together when servers are lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_opd.core.parallel import Parallel, PeerError
from megatron_opd.core.protocols import Lost


class ServersLost(ValueError):
    """No server is left that could do what the run needs; every rank raises it at the same place."""


class Together:
    """Guards work for which some ranks talk to servers."""

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A block that ends on all ranks together: when one rank raises Lost, every rank raises ServersLost.

        So the end of the block is a barrier, and no rank waits for one that has stopped. Collective over all ranks.
        """
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
