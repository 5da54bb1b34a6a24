"""The servers of one weight update, and what a way to them has to do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from megatron_opd.core.event_loop import Loop
from megatron_opd.core.named_weights import NamedWeights
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.errors import SGLangError, Unfit

_T = TypeVar("_T")
Failures = dict[Client, SGLangError]


class Session:
    """The servers of one update: those that are left, and why the others are not."""

    def __init__(self, clients: Sequence[Client], loop: Loop) -> None:
        """Requests run on `loop`."""
        self.alive = list(clients)
        self.failed: Failures = {}
        self.loop = loop

    def lose(self, failures: Failures) -> None:
        """Leave out the servers that failed."""
        self.failed |= failures
        self.alive = [client for client in self.alive if client not in failures]

    def refuse_unfit(self) -> None:
        """Raises the Unfit of a server that neither another try nor another server can help."""
        for error in self.failed.values():
            if isinstance(error, Unfit):
                raise error

    def each(self, work: Callable[[Client], Awaitable[None]]) -> None:
        """Do it with all that are left, at the same time; those that fail are lost."""
        _, failures = self.loop.run(at_once(self.alive, work))
        self.lose(failures)


class Transport(Protocol):
    """A way of the student's weights to servers, one update at a time. On the process that has the merged weights."""

    def send(self, session: Session, weights: NamedWeights, version: int, label: str) -> None:
        """Give the servers of the session the weights of `version`, on the thread that may run `weights`.

        Servers must report `label` as the version of their weights then. Those that fail are lost from the session.
        What is not read of `weights` is read by the caller.
        """

    async def again(self, client: Client, version: int) -> bool:
        """Give a server that lost them the weights of `version`, the last that were sent, and let it go on; False where
        nothing of them was kept. Raises an SGLangError when the server does not take them."""

    def close(self) -> None:
        """Give up connections and remove what was kept."""


async def at_once(
    clients: Sequence[Client], work: Callable[[Client], Awaitable[_T]]
) -> tuple[dict[Client, _T], Failures]:
    """Do it with all clients at the same time: the results, and the failures. Other errors than theirs are raised."""
    results = await asyncio.gather(*(work(client) for client in clients), return_exceptions=True)
    done: dict[Client, _T] = {}
    failures: Failures = {}
    for client, result in zip(clients, results, strict=True):
        if isinstance(result, SGLangError):
            failures[client] = result
        elif isinstance(result, BaseException):
            raise result
        else:
            done[client] = result
    return done, failures
