"""An asyncio event loop in a thread of its own, so that synchronous code can use asynchronous code.

Sessions, locks and tasks belong to one loop: whoever shares clients shares the Loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from megatron_opd.core import daemon_threads

_T = TypeVar("_T")
_JOIN_S = 10.0


class Loop:
    """Runs coroutines for synchronous callers until `close`."""

    def __init__(self, name: str = "sglang") -> None:
        """`name` is the thread's."""
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(daemon_threads.executor())
        self._thread = threading.Thread(target=_run, args=(self._loop,), name=name, daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Begin it now; `.result(timeout)` waits and re-raises, `.cancel()` cancels it on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, _T], timeout_s: float | None = None) -> _T:
        """Its result. Raises its exception, or TimeoutError (after cancelling it) when it takes longer.

        Without a time-out for the whole, the coroutine must have its own for every request. Not for the loop's thread.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("Loop.run would wait for itself: use `await` on the loop's own thread")
        future = self.start(coroutine)
        try:
            return future.result(timeout_s)
        except FutureTimeoutError:
            future.cancel()  # nothing happens to it when the TimeoutError is the coroutine's own
            raise
        except BaseException:
            future.cancel()  # an interrupt: do not leave it running
            raise

    def soon(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Have the loop's thread call a function."""
        self._loop.call_soon_threadsafe(call, *arguments)

    def close(self) -> None:
        """Cancel what is still running and end the thread. One that does not answer within ten seconds is left to
        itself: it ends with the process."""
        if self._loop.is_closed():
            return
        try:
            self.start(_cancel_others()).result(_JOIN_S)
        except FutureTimeoutError:
            self.abandon()
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_JOIN_S)
        self._loop.close()

    def abandon(self) -> None:
        """Leave a thread that does not answer; it stops when it does."""
        self._loop.call_soon_threadsafe(self._loop.stop)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        try:
            return loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            continue  # a task's own, which whoever awaits it gets: the other tasks go on


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
