"""The one HTTP client: a server's endpoints as typed methods, every request with a time-out, every answer checked.

Asynchronous, for one event loop (`loop.py`). JSON both ways; nothing that a server sends is ever unpickled. Retrying
and choosing among servers is the pool's job. Facts about SGLang are those of 0.5.23.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar

import aiohttp

from megatron_opd.config import ServersConfig
from megatron_opd.config.checks_serving import ADMIN_KEY, API_KEY
from megatron_opd.core.scores import TeacherScore
from megatron_opd.sglang import wire
from megatron_opd.sglang.errors import BadAnswer, Down, Refused, SGLangError

_T = TypeVar("_T")
CONNECT_S = 10.0
CONTROL_S = 60.0
"""Time-out of control requests that wait for no request of anybody else."""
_IDLE_S = 2.0
"""How long an unused connection is kept: servers drop theirs (SGLang after 5 s), and a request would find it closed."""
_SIZES = ("tp_size", "dp_size", "pp_size", "ep_size")
_QUOTED = 300
"""Characters of a server's own words in a message."""


@dataclass(slots=True)
class Usage:
    """What went over the connection since the start."""

    requests: int = 0
    seconds: float = 0.0
    """Summed over requests, which overlap."""
    bytes_sent: int = 0
    bytes_received: int = 0
    tokens: int = 0
    """Sampled or scored."""


class Client:
    """One server. Raises Refused, Down or BadAnswer, each with the url."""

    def __init__(self, url: str, servers: ServersConfig, *, vocab_size: int, context: int) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = servers.request_timeout_s
        self.limits = wire.ServerLimits(vocab_size=vocab_size, context=context)
        self.usage = Usage()
        self._max_in_flight = servers.max_in_flight
        self._in_flight: asyncio.Semaphore | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Drop the connections; requests under way fail."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def generate(self, draw: wire.Draw) -> wire.Drawn:
        """Sample one answer; an aborted one has the tokens so far."""
        body = wire.draw_body(draw, self.limits)
        answer = await self._work(body)
        drawn = self._read(lambda: wire.read_drawn(draw, answer, self.limits))
        self.usage.tokens += len(drawn.ids)
        return drawn

    async def score(self, ask: wire.Ask) -> TeacherScore:
        """What the model says about given tokens, for every one of them."""
        body = wire.ask_body(ask, self.limits)
        answer = await self._work(body)
        score = self._read(lambda: wire.read_score(ask, answer, self.limits))
        self.usage.tokens += len(ask.ids) - ask.first
        return score

    async def prove(self, timeout_s: float = CONTROL_S) -> None:
        """Have the server sample one token: one that is up may fail at that. It goes past requests that wait for their
        turn, and takes whatever weights there are. Raises Down, BadAnswer or Refused."""
        draw = wire.Draw(rid=uuid.uuid4().hex, ids=(0,), max_new_tokens=1, temperature=0.0, is_fixed=True)
        body, timeout_s = wire.draw_body(draw, self.limits), min(timeout_s, self.timeout_s)
        try:
            answer = await self._request("POST", "/generate", body, timeout_s)
        except Down:
            with suppress(SGLangError):  # one that is only slow should not go on with it
                await self._request("POST", "/abort_request", {"rid": draw.rid}, timeout_s, is_json=False)
            raise
        self._read(lambda: wire.read_drawn(draw, answer, self.limits))

    async def health(self, timeout_s: float = 30.0) -> None:
        """Returns when the server has just computed something. Raises Down (not: paused servers do not answer)."""
        await self._request("GET", "/health", None, timeout_s)

    async def model_info(self) -> dict[str, Any]:
        """Model path and `weight_version`, among others; answers also while the server is paused or busy."""
        return self._object(await self._request("GET", "/model_info", None, CONTROL_S), "/model_info")

    async def server_info(self) -> dict[str, Any]:
        """Its launch arguments as resolved (tp_size, context_length, …); sizes are numbers, where it has them."""
        info = self._object(await self._request("GET", "/server_info", None, CONTROL_S), "/server_info")
        if odd := {n: info[n] for n in _SIZES if not (type(info.get(n, 1)) is int and info.get(n, 1) >= 1)}:
            raise BadAnswer(f"{self.url}/server_info: {odd}")
        return info

    async def pause(self, mode: Literal["abort", "in_place", "retract"]) -> None:
        """abort: requests return with what they have; in_place: they keep their KV cache; retract: it is recomputed.

        Requests that arrive wait until `resume`.
        """
        await self.post("/pause_generation", {"mode": mode}, CONTROL_S)

    async def resume(self) -> None:
        """Go on after `pause`; harmless when not paused."""
        await self.post("/continue_generation", {}, CONTROL_S)

    async def flush(self, timeout_s: float = 30.0) -> None:
        """Empty the prefix cache. Raises Refused when requests still run after `timeout_s`."""
        await self._request("POST", f"/flush_cache?timeout={timeout_s}", {}, timeout_s + CONTROL_S, is_json=False)

    async def stop_sampling(self) -> None:
        """Nothing is computed and nothing is cached from now on, until `resume`; requests wait. Raises Refused when
        something is computed all the same."""
        await self.pause("retract")
        await self.flush(timeout_s=0)  # to wait is to wait for the paused requests too, which cannot end

    async def abort(self, rid: str | None = None) -> None:
        """End the request `rid`, or all; an unknown one is no error."""
        body = {"abort_all": True} if rid is None else {"rid": rid}
        await self._request("POST", "/abort_request", body, CONTROL_S, is_json=False)

    async def begin_weight_update(self, selector: dict[str, Any] | None = None) -> None:
        """Open the session that 0.5.23 demands around updates by broadcast and by tensor."""
        await self.order("/begin_weight_update", {} if selector is None else {"selector": selector}, self.timeout_s)

    async def end_weight_update(self) -> None:
        """Close it: the server finishes what it does after loading."""
        await self.order("/end_weight_update", {}, self.timeout_s)

    async def checksums(self) -> dict[str, Any]:
        """The server's own checksums of its weights, as /weights_checker answers."""
        return await self.order("/weights_checker", {"action": "checksum"}, self.timeout_s)

    async def post(self, path: str, body: dict[str, Any], timeout_s: float | None = None) -> Any:
        """Any other endpoint: JSON there, JSON back. 200 with `success: false` is Refused too."""
        answer = await self._request("POST", path, body, self.timeout_s if timeout_s is None else timeout_s)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise Refused(f"{self.url}{path}: {str(answer.get('message'))[:_QUOTED]}")
        return answer

    async def order(self, path: str, body: dict[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """An endpoint that says whether it succeeded: all else with a 200, a proxy's error perhaps, is BadAnswer."""
        answer = await self.post(path, body, timeout_s)
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise BadAnswer(f"{self.url}{path}: does not say that it succeeded: {str(answer)[:_QUOTED]}")
        return answer

    async def _work(self, body: dict[str, Any]) -> Any:
        """/generate, with no more requests under way than allowed; control requests never wait behind these."""
        if self._in_flight is None:
            self._in_flight = asyncio.Semaphore(self._max_in_flight)
        async with self._in_flight:
            return await self._request("POST", "/generate", body, self.timeout_s)

    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float, *, is_json: bool = True
    ) -> Any:
        """The answer's JSON; None for an empty one, and where none is expected."""
        sent = b"" if body is None else json.dumps(body, allow_nan=False).encode()
        started = time.monotonic()
        try:
            status, received = await self._exchange(method, path, sent, timeout_s)
        except TimeoutError:
            raise Down(f"{self.url}{path}: no answer in {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Down(f"{self.url}{path}: {type(error).__name__}: {error}") from None
        finally:
            self.usage.requests += 1
            self.usage.seconds += time.monotonic() - started
            self.usage.bytes_sent += len(sent)
        self.usage.bytes_received += len(received)
        if status != 200:
            kind = Refused if 400 <= status < 500 and status not in (408, 429) else Down
            raise kind(f"{self.url}{path}: {status}: {received[:_QUOTED].decode(errors='replace')}")
        if not is_json or not received:
            return None
        try:
            return json.loads(received)
        except ValueError as error:
            raise BadAnswer(f"{self.url}{path}: not JSON: {error}") from None

    async def _exchange(self, method: str, path: str, sent: bytes, timeout_s: float) -> tuple[int, bytes]:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S)
        key = os.environ.get(API_KEY, "")
        if method == "POST" and path != "/generate":  # a server with an admin key takes no other one for control
            key = os.environ.get(ADMIN_KEY) or key
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        if self._session is None:
            # Room beside the requests that wait for answers: a pause must come through when all of those are queued.
            connector = aiohttp.TCPConnector(limit=self._max_in_flight + 16, keepalive_timeout=_IDLE_S)
            self._session = aiohttp.ClientSession(connector=connector)
        request = self._session.request(
            method, self.url + path, data=sent or None, headers=headers, timeout=timeout, allow_redirects=False
        )
        async with request as response:
            return response.status, await response.read()

    def _read(self, read: Callable[[], _T]) -> _T:
        try:
            return read()
        except (BadAnswer, Refused) as error:
            raise type(error)(f"{self.url}: {error}") from None

    def _object(self, answer: Any, path: str) -> dict[str, Any]:
        if not isinstance(answer, dict):
            raise BadAnswer(f"{self.url}{path}: not an object")
        return answer
