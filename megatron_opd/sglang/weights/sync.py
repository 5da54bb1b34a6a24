"""Gives servers the student's weights: pause, flush, update, go on; with a version, and a check when asked for.

`push` gives a stream of weights to all servers. One that fails on the way is left out, and reported, while the others
go on; it keeps what it has, half an update perhaps, until a later push, which includes it as soon as it answers again.
`give` is the gate before work: it lets a server through that holds the weights of the last push, or can be given them.

How weights travel is the transport's part (`transports.py`). One that keeps them gives them to a server that came back
with others; otherwise that server waits for the next push.

Servers on the trainer's GPUs (`servers.colocated`) give their memory back in `release`, weights and all; a push brings
it back: first the weights' place, then the weights, then the place of the cache.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megatron_opd.config import RolloutConfig
from megatron_opd.core.event_loop import Loop
from megatron_opd.core.named_weights import NamedWeights, drain
from megatron_opd.sglang import server_memory
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.errors import Down, SGLangError
from megatron_opd.sglang.pool import PROBE_S
from megatron_opd.sglang.weights import fp8_weights
from megatron_opd.sglang.weights.expected import Expected
from megatron_opd.sglang.weights.session import Session
from megatron_opd.sglang.weights.transports import TransportInputs, way_of

Writer = Callable[[NamedWeights, Path], None]
"""As in TransportInputs."""


_LOOK_S = 0.5


class WeightPush:
    """One for a run, on the process that has the merged weights."""

    def __init__(self, rollout: RolloutConfig, loop: Loop, *, model: str | Path, write: Writer, spool: Path) -> None:
        """`model` is the student's Hugging Face directory; `write` and `spool` as in TransportInputs. Raises ValueError
        for a transport that cannot reach the servers."""
        self._config, self._loop, self._model = rollout, loop, Path(model)
        inputs = TransportInputs(rollout=rollout, loop=loop, write=write, spool=spool)
        self._transport = way_of(rollout).build(inputs)
        self._lock = asyncio.Lock()
        self._is_in_fp8 = rollout.quantization == "fp8"
        self._is_colocated, self._are_released = rollout.servers.colocated, False
        self._version: int | None = None
        self._holders: dict[Client, int] = {}
        """The version that we know a server to hold; one that is missing may hold anything."""

    def push(self, clients: Sequence[Client], weights: NamedWeights, version: int) -> dict[str, SGLangError]:
        """Give them all the weights; returns the failures by url. From the thread that may run `weights`, to its end.

        When no server answers, one that is being started again is waited for, `servers.patience_s`. Raises Down when no
        server is left, and Unfit when one is not set up for the student's weights.
        """
        session = Session(clients, self._loop)
        expected = Expected(self._model) if self._config.sync_verify else None
        self._loop.run(self._lock.acquire())
        try:
            session = self._greet_all(clients)
            self._holders = {}
            if self._is_colocated:
                session.each(server_memory.take_for_weights)
            session.each(partial(fp8_weights.check_server, in_fp8=self._is_in_fp8))
            session.refuse_unfit()
            sent = fp8_weights.quantized(weights) if self._is_in_fp8 else weights
            if expected is not None:
                session.each(expected.ask_layout)
                sent = expected.watch(sent)
            label = server_memory.WITHOUT_CACHE if self._is_colocated else str(version)
            self._transport.send(session, sent, version, label)
            if expected is not None:
                session.each(expected.check)
            if self._is_colocated:
                self._are_released = False
                session.each(lambda client: server_memory.take_for_cache(client, version))
            session.each(Client.resume)
            self._holders = dict.fromkeys(session.alive, version)
        finally:
            self._version = version
            self._loop.run(_release(self._lock))
            drain(weights)  # other ranks take part in gathering them, and wait for us
        if not session.alive:
            raise Down("no server has taken the weights:\n" + "\n".join(f"  {e}" for e in session.failed.values()))
        return {client.url: error for client, error in session.failed.items()}

    def release(self, clients: Sequence[Client]) -> dict[str, SGLangError]:
        """Have them give all their memory back, until the next push; returns the failures by url. Nobody may be waiting
        for an answer of theirs."""
        session = Session(clients, self._loop)
        self._loop.run(self._lock.acquire())
        try:
            self._are_released = True
            session.each(self._greet)
            session.each(server_memory.release)
            self._holders = {client: held for client, held in self._holders.items() if client in session.alive}
        finally:
            self._loop.run(_release(self._lock))
        return {client.url: error for client, error in session.failed.items()}

    async def give(self, client: Client) -> None:
        """Return when the server holds the weights of the last push. Raises an SGLangError when it does not.

        A server that lost them, because it was started again, gets them again where the transport has kept them, and
        has to wait for the next push otherwise. Where the others have given their memory back, so does this one.
        """
        async with self._lock:
            if self._version is None:
                raise Down(f"{client.url}: there are no weights yet")
            if self._are_released:
                await server_memory.release(client)
                raise Down(f"{client.url}: has given its memory back, and waits for the next weights")
            info = await client.model_info()
            if self._holders.get(client) == self._version and info.get("weight_version") == str(self._version):
                return
            if not await self._transport.again(client, self._version):
                raise Down(f"{client.url}: waits for the next weights, which will be of version {self._version + 1}")
            self._holders[client] = self._version

    def close(self) -> None:
        """Give up what the transport holds."""
        self._transport.close()

    def _greet_all(self, clients: Sequence[Client]) -> Session:
        """A session of those that answer."""
        deadline = time.monotonic() + self._config.servers.patience_s
        while True:
            session = Session(clients, self._loop)
            session.each(self._greet)
            if session.alive or time.monotonic() > deadline:
                return session
            time.sleep(_LOOK_S)

    async def _greet(self, client: Client) -> None:
        """Whether it answers at all. One that was lost before has less time for it, so as not to hold up the others."""
        was_lost = self._version is not None and self._holders.get(client) != self._version
        try:
            await asyncio.wait_for(client.model_info(), PROBE_S if was_lost else None)
        except TimeoutError:
            raise Down(f"{client.url}: still no answer after {PROBE_S:g} s") from None


async def _release(lock: asyncio.Lock) -> None:
    lock.release()  # on its own loop, where the next one waits
