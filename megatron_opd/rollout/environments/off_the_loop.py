"""Work that blocks, kept off the event loop: a thread for each piece, which nobody waits for when the program ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from megatron_opd.core.daemon_threads import started

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Its result, or its exception. A thread cannot be ended: where this is cancelled, the function goes on."""
    return await asyncio.wrap_future(started(function, *arguments))


def run_once(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The coroutine's result, from code that is not async; an event loop may run in this thread or not."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(work())).result()
