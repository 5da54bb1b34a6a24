"""Several servers of one model: who gets a request, what happens when one fails, and when it gets work again.

A request that failed goes to a server that it has not failed on, with growing, jittered pauses. When it has failed on
all that are up, it goes to them again, a bounded number of times in all. Its result is awaited in one place, so it is
neither lost nor counted twice.

A server that failed gets no work until `on_return` has made it equal to the others and it has answered a small
request: one that is up need not be able. Each time that it fails again without an answer in between, it is left alone
for longer. When none is left, requests wait `servers.patience_s`, from the moment the last one failed, for one to come
back. Everything here runs on one event loop.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Set
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from megatron_opd.config import ServersConfig
from megatron_opd.sglang.client import Client, Usage
from megatron_opd.sglang.errors import RETRIED, Down, SGLangError
from megatron_opd.sglang.wire import ServerLimits

_T = TypeVar("_T")
Work = Callable[[Client, str], Awaitable[_T]]
"""(server, request id) -> result."""
MAX_PAUSE_S = 30.0
PROBE_S = 5.0
"""Between looks at a server that failed, at first; what it has for its answer when others wait for that, too."""
MAX_PROBE_S = 300.0


class NoneLeft(Down):
    """No server is up, and none has come back in time: trying again at once cannot help."""


@dataclass(slots=True, eq=False)
class _Server:
    client: Client
    outstanding: int = 0
    """Tokens of requests that are with it."""
    error: Exception | None = None
    """Why it gets no work; None while it does."""
    last_error: Exception | None = None
    """Why it had none the last time, since when it has answered nothing but the small request that let it back."""
    strikes: int = 0
    """Failures since it answered a request."""
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
        probe_s: float = PROBE_S,
    ) -> None:
        """`on_return` is called for a server that is up again, before it gets work; while it raises, it gets none.
        `pause_s` is the longest first pause before a request is sent again; later ones are longer. `probe_s` as
        PROBE_S."""
        self.name = name
        self._servers = [_Server(client) for client in clients]
        self._attempts, self._probe_s, self._pause_s = servers.retries + 1, probe_s, pause_s
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
        return [server.client for server in self._up()]

    def _up(self) -> list[_Server]:
        return [server for server in self._servers if server.error is None]

    async def run(self, work: Work[_T], *, group: ServerGroup, tokens: int) -> _T:
        """`work` on a server of the pool. `tokens` says how much it is; `group` keeps related requests together.

        Raises Refused from the first server that says so, and Down when the request failed as often as it may, and on
        every server that is up, or when no server is left.
        """
        request = uuid.uuid4().hex
        failed: set[_Server] = set()
        attempts = AsyncRetrying(
            stop=lambda state: state.attempt_number >= self._attempts and failed.issuperset(self._up()),
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
                    server = await self._choose(group, failed)
                    failed.add(server)  # unless it does not fail
                    return await self._once(server, work, tokens, f"{request}-{number}")
        except NoneLeft as error:
            raise Down(f"{self.name}: {error}{self.state()}") from error
        except RETRIED as error:
            times = attempts.statistics["attempt_number"]
            raise Down(f"{self.name}: a request failed {times} times, last: {error}{self.state()}") from error
        raise AssertionError("tenacity returns or raises")

    def mark_down(self, client: Client, error: Exception) -> None:
        """No work for this server until it answers again and is taken back. On the loop's thread."""
        server = self._server(client)
        is_news, server.error = server.error is None, error
        if is_news:
            server.strikes += 1
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

    async def take_back(self, client: Client) -> None:
        """Give the server work again, if it had none and is able to: it has just taken what the others have."""
        server = self._server(client)
        if server.error is None:
            return
        try:
            await client.prove(self._probe_s)
        except SGLangError as error:
            self._stays_out(server, error)
        else:
            self._let_in(server)

    def _stays_out(self, server: _Server, error: Exception) -> bool:
        """Note why a look at it failed. False when another look let it in meanwhile: then it has work, and nobody would
        look at it again if it were marked here."""
        if server.error is None:
            return False
        server.error = error
        return True

    def _let_in(self, server: _Server) -> None:
        if server.error is not None:
            server.last_error, server.error = server.error, None
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

    async def _once(self, server: _Server, work: Work[_T], tokens: int, rid: str) -> _T:
        server.outstanding += tokens
        try:
            result = await self._run_on(server, work(server.client, rid))
        except SGLangError as error:
            self._counts[f"failures/{error.kind}"] += 1
            if isinstance(error, RETRIED):
                self.mark_down(server.client, error)
                self._start(_abort(server.client, rid))
            raise
        finally:
            server.outstanding -= tokens
        server.strikes, server.last_error = 0, None
        return result

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

    async def _choose(self, group: ServerGroup, failed: Set[_Server]) -> _Server:
        """The group's server while it works, else the one with the least outstanding work; none of `failed` while there
        is another. Waits for one that is up. Raises NoneLeft."""
        await self._until_one_is_up()
        up = self._up()
        able = [server for server in up if server not in failed] or up
        if group.server not in able:
            group.server = min(able, key=lambda server: server.outstanding)
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
        pause_s = min(self._probe_s * 2 ** min(server.strikes - 1, 16), MAX_PROBE_S)
        while True:
            await asyncio.sleep(pause_s)
            if server.error is None:
                return
            try:
                await server.client.health()
                if self._on_return is not None:
                    await self._on_return(server.client)
                await server.client.prove()
            except Exception as error:  # whatever it is, the server is not ready; the reason shows when none is left
                if self._stays_out(server, error):
                    continue
                return
            self._let_in(server)
            return

    def state(self) -> str:
        """Every server and what is wrong with it, for a message; begins a line each."""
        return "".join(f"\n  {server.client.url}: {_how_it_is(server)}" for server in self._servers)

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


def _how_it_is(server: _Server) -> str:
    if server.error is not None:
        return str(server.error) or type(server.error).__name__
    return "up" if server.last_error is None else f"up, and it failed before: {server.last_error}"


async def _abort(client: Client, rid: str) -> None:
    """Best effort: a server that is only slow should not go on with what another one does now."""
    try:
        await client.abort(rid)
    except SGLangError:
        return
