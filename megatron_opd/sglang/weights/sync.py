"""Gives servers the student's weights: pause, flush, update, go on; with a version, and a check when asked for.

`push` gives a stream of weights to all servers. One that fails on the way is left out, and reported, while the others
go on; it keeps what it has, half an update perhaps, until a later push, which includes it as soon as it answers again.
`give` is the gate before work: it lets a server through that holds the weights of the last push, or can be given them.

What is kept between pushes: nothing with `broadcast` and `tensor`, so that a server which came back with other weights
waits for the next push; the newest directory with `disk`, which a returned server loads at once.

Servers on the trainer's GPUs (`servers.colocated`) give their memory back in `release`, weights and all; a push brings
it back: first the weights' place, then the weights, then the place of the cache.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from megatron_opd.config import RolloutConfig
from megatron_opd.core.named_weights import NamedWeights
from megatron_opd.sglang import server_memory
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.errors import Down, Refused, SGLangError
from megatron_opd.sglang.event_loop import Loop
from megatron_opd.sglang.weights.broadcast import Broadcast, Failures
from megatron_opd.sglang.weights.buckets import buckets
from megatron_opd.sglang.weights.expected import Expected
from megatron_opd.sglang.weights.tensor import Inline

Writer = Callable[[NamedWeights, Path], None]
"""Writes all weights as a Hugging Face directory, which has its name only when it is complete."""


class WeightPush:
    """One for a run, on the process that has the merged weights."""

    def __init__(self, rollout: RolloutConfig, loop: Loop, *, model: str | Path, write: Writer, spool: Path) -> None:
        """`model` is the student's Hugging Face directory; `write` and `spool`, a directory that the servers see under
        the same path, are for `rollout.sync: disk`."""
        self._config, self._loop = rollout, loop
        self._model, self._write, self._spool = Path(model), write, spool
        self._transport = Inline() if rollout.sync == "tensor" else Broadcast(rollout.servers.request_timeout_s)
        self._lock = asyncio.Lock()
        self._is_colocated, self._are_released = rollout.servers.colocated, False
        self._version: int | None = None
        self._holders: dict[Client, int] = {}
        """The version that we know a server to hold; one that is missing may hold anything."""

    def push(self, clients: Sequence[Client], weights: NamedWeights, version: int) -> dict[str, SGLangError]:
        """Give them all the weights; returns the failures by url. From the thread that may run `weights`, to its end.

        Raises Down when no server is left.
        """
        session = _Session(clients)
        expected = Expected(self._model) if self._config.sync_verify else None
        self._loop.run(self._lock.acquire())
        try:
            self._loop.run(session.each(self._greet))
            self._holders = {}
            if self._is_colocated:
                self._loop.run(session.each(server_memory.take_for_weights))
            if expected is not None:
                self._loop.run(session.each(expected.ask_layout))
                weights = expected.watch(weights)
            label = server_memory.WITHOUT_CACHE if self._is_colocated else str(version)
            if self._config.sync == "disk":
                self._push_directory(session, weights, version, label)
            else:
                self._push_stream(session, weights, label)
            if expected is not None:
                self._loop.run(session.each(expected.check))
            if self._is_colocated:
                self._are_released = False
                self._loop.run(session.each(lambda client: server_memory.take_for_cache(client, version)))
            self._loop.run(session.each(Client.resume))
            self._holders = dict.fromkeys(session.alive, version)
        finally:
            self._version = version
            self._loop.run(_release(self._lock))
            deque(weights, maxlen=0)  # other ranks take part in gathering them, and wait for us
        if not session.alive:
            raise Down("no server has taken the weights:\n" + "\n".join(str(e) for e in session.failed.values()))
        return {client.url: error for client, error in session.failed.items()}

    def release(self, clients: Sequence[Client]) -> dict[str, SGLangError]:
        """Have them give all their memory back, until the next push; returns the failures by url. Nobody may be waiting
        for an answer of theirs."""
        session = _Session(clients)
        self._loop.run(self._lock.acquire())
        try:
            self._are_released = True
            self._loop.run(session.each(self._greet))
            self._loop.run(session.each(server_memory.release))
            self._holders = {client: held for client, held in self._holders.items() if client in session.alive}
        finally:
            self._loop.run(_release(self._lock))
        return {client.url: error for client, error in session.failed.items()}

    async def give(self, client: Client) -> None:
        """Return when the server holds the weights of the last push. Raises an SGLangError when it does not.

        A server that lost them, because it was started again, gets them from the directory of `disk`, and has to wait
        for the next push otherwise. Where the others have given their memory back, so does this one.
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
            directory = self._directory(self._version)
            if self._config.sync != "disk" or not directory.is_dir():
                raise Down(f"{client.url}: waits for the next weights, which will be of version {self._version + 1}")
            await _load(client, directory, str(self._version))
            await client.resume()
            self._holders[client] = self._version

    def close(self) -> None:
        """Leave the process group, if there is one, and remove the directory that servers loaded from."""
        self._loop.run(self._transport.drop())
        shutil.rmtree(self._spool, ignore_errors=True)

    def _push_stream(self, session: _Session, weights: NamedWeights, label: str) -> None:
        self._loop.run(session.each(_open))
        for bucket in buckets(weights, self._config.sync_bucket_mb << 20):
            if session.alive:
                session.lose(self._loop.run(self._transport.send(session.alive, bucket, label)))
        self._loop.run(session.each(Client.end_weight_update))

    def _push_directory(self, session: _Session, weights: NamedWeights, version: int, label: str) -> None:
        directory = self._directory(version)
        self._write(weights, directory)
        self._loop.run(session.each(lambda client: _load(client, directory, label)))
        for old in self._spool.glob("v*"):
            if old != directory:
                shutil.rmtree(old, ignore_errors=True)

    def _directory(self, version: int) -> Path:
        return self._spool / f"v{version}"

    async def _greet(self, client: Client) -> None:
        """Whether it answers at all. One that was lost before has less time for it, so as not to hold up the others."""
        was_lost = self._version is not None and self._holders.get(client) != self._version
        try:
            await asyncio.wait_for(client.model_info(), self._config.servers.probe_s if was_lost else None)
        except TimeoutError:
            raise Down(f"{client.url}: still no answer after {self._config.servers.probe_s:g} s") from None


async def _release(lock: asyncio.Lock) -> None:
    lock.release()  # on its own loop, where the next one waits


class _Session:
    """The servers of one push: those that are left, and why the others are not."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self.alive = list(clients)
        self.failed: dict[Client, SGLangError] = {}

    def lose(self, failures: Failures) -> None:
        self.failed |= failures
        self.alive = [client for client in self.alive if client not in failures]

    async def each(self, work: Callable[[Client], Awaitable[None]]) -> None:
        """Do it with all that are left, at the same time; those that fail are lost."""
        results = await asyncio.gather(*(work(client) for client in self.alive), return_exceptions=True)
        failures: Failures = {}
        for client, result in zip(self.alive, results, strict=True):
            if isinstance(result, SGLangError):
                failures[client] = result
            elif isinstance(result, BaseException):
                raise result
        self.lose(failures)


async def _open(client: Client) -> None:
    await client.stop_sampling()
    try:
        await client.begin_weight_update()
    except Refused:  # still open since an update that broke off
        await client.end_weight_update()
        await client.begin_weight_update()


async def _load(client: Client, directory: Path, label: str) -> None:
    """From a directory. SGLang goes back to what it had when that fails."""
    await client.stop_sampling()
    body = {"model_path": str(directory.absolute()), "flush_cache": False, "weight_version": label}
    await client.order("/update_weights_from_disk", body, client.timeout_s)
