"""Servers that end before their run does: each is reported and started again at its address, so many times.

Whoever uses them needs to know nothing of it: the pool of each rank looks at a server that comes back, and gives it the
current weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_opd.sglang import process
from megatron_opd.sglang.process import Server

_LOOK_S = 1.0


class Keeper:
    """Of servers that were ready once. Replaces those in the list that it starts again."""

    def __init__(self, servers: list[Server], *, restarts: int, say: Callable[[str], None]) -> None:
        """`restarts` is how often, all servers together."""
        self.servers, self.say = servers, say
        self._left = restarts
        self._gone: set[str] = set()

    def look(self) -> None:
        """Start again what has ended, while it may be."""
        for i, server in enumerate(self.servers):
            if server.process.poll() is None or server.url in self._gone:
                continue
            said = f"{process.obituary(server)}, see {server.log}"
            if not self._left:
                self._gone.add(server.url)
                self.say(f"{said}; it is not started again (run.max_restarts)")
                continue
            self._left -= 1
            try:
                self.servers[i] = process.restart(server)
            except OSError as error:
                self._gone.add(server.url)
                self.say(f"{said}; it cannot be started again: {error}")
                continue
            self.say(f"{said}; it starts again ({self._left} more restart(s) by run.max_restarts)")

    def lost(self) -> list[str]:
        """Names of what no server is left for."""
        served: dict[str, bool] = {}
        for server in self.servers:
            served[server.name] = served.get(server.name, False) or server.url not in self._gone
        return [name for name, is_served in served.items() if not is_served]


@contextmanager
def kept(keeper: Keeper) -> Iterator[None]:
    """Look after them beside the block, in a thread: the kernel ends what a thread has started when that thread ends,
    so it stays for the whole block."""
    over = threading.Event()

    def keep() -> None:
        while not over.wait(_LOOK_S):
            keeper.look()

    thread = threading.Thread(target=keep, name="keeper", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
