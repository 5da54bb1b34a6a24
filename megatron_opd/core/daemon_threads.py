"""Work that blocks, in a thread of its own for each piece, for which nobody waits when the program ends.

The threads of asyncio's own executor are few and shared, so work that hangs would hold up all other work, and then the
end of the program.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

_T = TypeVar("_T")


def started(function: Callable[..., _T], /, *arguments: Any, **named: Any) -> Future[_T]:
    """The function's result, which it works on from now on. A thread cannot be ended: one that is cancelled goes on."""
    future: Future[_T] = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            result = function(*arguments, **named)
        except Exception as error:
            # Python gives a StopIteration a meaning where somebody awaits it.
            future.set_exception(RuntimeError(repr(error)) if isinstance(error, StopIteration) else error)
        except BaseException as error:  # a SystemExit would end whoever awaits it
            future.set_exception(RuntimeError(repr(error)))
        else:
            future.set_result(result)

    threading.Thread(target=work, daemon=True, name="blocking").start()
    return future


def executor() -> ThreadPoolExecutor:
    """An executor of that kind for an event loop, which takes no other class: `asyncio.to_thread` uses it."""
    made = ThreadPoolExecutor(1)  # which starts no thread before it is asked to
    made.submit = started  # type: ignore[method-assign]
    return made
