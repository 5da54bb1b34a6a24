"""Several servers of one model: who gets a request, what happens when one fails, and when it gets work again.

A request that failed goes to another server, a bounded number of times with growing, jittered pauses; its result is
awaited in one place, so it is neither lost nor counted twice. A server that failed gets no work until it answers again
and `on_return` has made it equal to the others. When none is left, requests wait `servers.patience_s`, from the moment
the last one failed, for one to come back. Everything here runs on one event loop.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from megatron_opd.config import ServersConfig
from megatron_opd.sglang.client import Client, Usage
from megatron_opd.sglang.errors import RETRIED, Down, SGLangError
from megatron_opd.sglang.wire import ServerLimits

_T = TypeVar("_T")
Work = Callable[[Client, str], Awaitable[_T]]
"""(server, request id) -> result."""
MAX_PAUSE_S = 30.0


class NoneLeft(Down):
    """No server is up, and none has come back in time: trying again at once cannot help."""


@dataclass(slots=True, eq=False)
class _Server:
    client: Client
    outstanding: int = 0
    """Tokens of requests that are with it."""
    error: Exception | None = None
    """Why it gets no work; None while it does."""
    running: set[asyncio.Future[Any]] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class ServerGroup:
    """Requests that share a prefix, and therefore a server as long as it works."""

    server: _Server | None = None


class Pool:
    """The servers of one model, reached through `clients`."""

    def __init__(
        self,
        clients: list[Client],
        servers: ServersConfig,
        *,
        name: str,
        on_return: Callable[[Client], Awaitable[None]] | None = None,
        pause_s: float = 1.0,
    ) -> None:
        """`on_return` is called for a server that answers again, before it gets work; while it raises, it gets none.
        `pause_s` is the longest first pause before a request is sent again; later ones are longer."""
        self.name = name
        self._servers = [_Server(client) for client in clients]
        self._attempts, self._probe_s, self._pause_s = servers.retries + 1, servers.probe_s, pause_s
        self._patience_s = servers.patience_s
        self._any_up = asyncio.Event()
        self._any_up.set()
        self._none_since = 0.0
        self._on_return = on_return
        self._counts: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def clients(self) -> list[Client]:
        """All servers, also those that are down."""
        return [server.client for server in self._servers]

    def up(self) -> list[Client]:
        """Servers that get work."""
        return [server.client for server in self._servers if server.error is None]

    async def run(self, work: Work[_T], *, group: ServerGroup, tokens: int) -> _T:
        """`work` on a server of the pool. `tokens` says how much it is; `group` keeps related requests together.

        Raises Refused from the first server that says so, and Down when the request failed as often as it may, or
        when no server is left.
        """
        request = uuid.uuid4().hex
        attempts = AsyncRetrying(
            stop=stop_after_attempt(self._attempts),
            wait=wait_random_exponential(multiplier=self._pause_s, max=MAX_PAUSE_S),
            retry=retry_if_exception(lambda error: isinstance(error, RETRIED) and not isinstance(error, NoneLeft)),
            reraise=True,
        )
        self._counts["requests"] += 1
        try:
            async for attempt in attempts:
                with attempt:
                    number = attempt.retry_state.attempt_number
                    self._counts["retries"] += number > 1
                    return await self._once(work, group, tokens, f"{request}-{number}")
        except NoneLeft as error:
            raise Down(f"{self.name}: {error}{self.state()}") from error
        except RETRIED as error:
            raise Down(f"{self.name}: a request failed {self._attempts} times, last: {error}{self.state()}") from error
        raise AssertionError("tenacity returns or raises")

    def mark_down(self, client: Client, error: Exception) -> None:
        """No work for this server until it answers again and is taken back. On the loop's thread."""
        server = self._server(client)
        is_news, server.error = server.error is None, error
        if is_news:
            self._counts["losses"] += 1
            self._start(self._win_back(server))
            if not self.up():
                self._any_up.clear()
                self._none_since = time.monotonic()

    def evict(self, client: Client, error: Exception) -> None:
        """Mark a server down whose answers could only be wrong: its requests go elsewhere at once."""
        self.mark_down(client, error)
        server = self._server(client)
        while server.running:
            server.running.pop().cancel()

    def take_back(self, client: Client) -> None:
        """Give the server work again, if it had none: it has just shown that it is equal to the others."""
        server = self._server(client)
        if server.error is not None:
            server.error = None
            self._any_up.set()
            self._counts["returns"] += 1

    def metrics(self) -> dict[str, float]:
        """What was counted since the last call, and how many servers are down now."""
        now = self._counts.copy()
        for usage in (server.client.usage for server in self._servers):
            for counter in fields(Usage):
                now[f"http/{counter.name}"] += getattr(usage, counter.name)
        news = {name: float(value - self._reported[name]) for name, value in now.items()}
        self._reported = now
        return {**news, "servers_down": float(len(self._servers) - len(self.up()))}

    async def close(self) -> None:
        """Stop probing and drop all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self._servers:
            await server.client.close()

    async def _once(self, work: Work[_T], group: ServerGroup, tokens: int, rid: str) -> _T:
        await self._until_one_is_up()
        server = self._choose(group)
        server.outstanding += tokens
        try:
            return await self._run_on(server, work(server.client, rid))
        except SGLangError as error:
            self._counts[f"failures/{error.kind}"] += 1
            if isinstance(error, RETRIED):
                self.mark_down(server.client, error)
                self._start(_abort(server.client, rid))
            raise
        finally:
            server.outstanding -= tokens

    async def _run_on(self, server: _Server, work: Awaitable[_T]) -> _T:
        """`work`, until `evict` takes it from the server. Raises Down then."""
        task = asyncio.ensure_future(work)
        server.running.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if task in server.running:  # it is we who are cancelled
                raise
            raise Down(f"{server.client.url}: taken away: {server.error}") from None
        finally:
            server.running.discard(task)

    def _choose(self, group: ServerGroup) -> _Server:
        """The group's server while it works, else the one with the least outstanding work."""
        if group.server is None or group.server.error is not None:
            up = [server for server in self._servers if server.error is None]
            group.server = min(up, key=lambda server: server.outstanding)
        return group.server

    async def _until_one_is_up(self) -> None:
        if not self._any_up.is_set():
            left_s = self._none_since + self._patience_s - time.monotonic()
            try:
                await asyncio.wait_for(self._any_up.wait(), max(left_s, 0.0))
            except TimeoutError:
                raise NoneLeft(f"no server is up, and none came back in {self._patience_s:g} s") from None

    def _server(self, client: Client) -> _Server:
        return next(server for server in self._servers if server.client is client)

    async def _win_back(self, server: _Server) -> None:
        """Until somebody has taken it back."""
        while True:
            await asyncio.sleep(self._probe_s)
            if server.error is None:
                return
            try:
                await server.client.health()
                if self._on_return is not None:
                    await self._on_return(server.client)
            except Exception as error:  # whatever it is, the server is not ready; the reason shows when none is left
                server.error = error
                continue
            self.take_back(server.client)
            return

    def state(self) -> str:
        """Every server and what is wrong with it, for a message; begins a line each."""
        said = [f"\n  {s.client.url}: {s.error or 'up'}" for s in self._servers]
        return "".join(said)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def connect(
    servers: ServersConfig,
    limits: ServerLimits,
    *,
    name: str,
    on_return: Callable[[Client], Awaitable[None]] | None = None,
) -> Pool:
    """A pool over `servers.urls`, which serve a model of these limits; nothing is sent yet. `name` is for messages."""
    clients = [Client(url, servers, vocab_size=limits.vocab_size, context=limits.context) for url in servers.urls]
    return Pool(clients, servers, name=name, on_return=on_return)


async def _abort(client: Client, rid: str) -> None:
    """Best effort: a server that is only slow should not go on with what another one does now."""
    try:
        await client.abort(rid)
    except SGLangError:
        return
