"""Signals that ask the program to end, and those of them that Python loses.

A handler raises an exception, wherever the program is. In a callback (of a weak reference, of an object that goes)
nobody can catch it: Python prints it and goes on, so Ctrl-C at a bad moment would do nothing. Such a signal is sent
again a moment later.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_opd.core.preemption import Preempted

_AGAIN_S = 0.02
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)


class Interrupted(KeyboardInterrupt):
    """A signal asks the launcher to end. It is a KeyboardInterrupt, because an event loop lets no other one through."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def deferred() -> Iterator[None]:
    """Signals that come in the block, and that have a handler here, are dealt with at its end: so what the block starts
    is known to whoever ends it. Elsewhere than in the main thread, which alone has handlers, the block is as it is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: handler for number in _ENDING if callable(handler := signal.getsignal(number))}
    try:
        for number in before:
            signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for heard in came:
            signal.raise_signal(heard)


def keep() -> None:
    """From now on no such signal is lost."""
    sys.unraisablehook = _heard_nowhere


def _heard_nowhere(lost: Any) -> None:
    """In place of Python's own message."""
    number = _number(lost.exc_value)
    if number is None:
        sys.__unraisablehook__(lost)
    else:  # not from here, which is within the callback
        _thread.start_new_thread(_send_again, (number,))


def _number(error: BaseException | None) -> int | None:
    """The signal whose handler has raised this; None for an error of any other kind."""
    if isinstance(error, Interrupted):
        return error.number
    if isinstance(error, Preempted):
        return signal.SIGUSR1
    return signal.SIGINT if isinstance(error, KeyboardInterrupt) else None


def _send_again(number: int) -> None:
    time.sleep(_AGAIN_S)
    os.kill(os.getpid(), number)
