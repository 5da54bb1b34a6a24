"""Signals that end a run, for as long as the launcher lives: an exit code and one message, wherever it is."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_opd.core import preemption, run_dir
from megatron_opd.core.interrupts import Interrupted

_INTERRUPTIONS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def until_interrupted(directory: str, work: Callable[[], int]) -> int:
    """The exit code of `work`, a run in `directory`.

    SIGTERM, SIGHUP and SIGINT end it; the exit code is then 128 and the signal's number, as shells have it. SIGUSR1
    asks it to make room: `work` passes that on once there are ranks, and before, the exit code is preemption.EXIT_CODE.
    """
    try:
        with _interruptible():
            return work()
    except preemption.Preempted:
        return preemption.EXIT_CODE
    except Interrupted as interrupted:
        mend_terminal()
        print(f"error: interrupted; {run_dir.how_to_continue(directory)}", file=sys.stderr)
        return 128 + interrupted.number


@contextmanager
def _interruptible() -> Iterator[None]:
    """Within the block, signals that end programs raise Interrupted, and SIGUSR1 raises Preempted.

    Ignored ones stay so, for us and for what we start: `nohup` ignores SIGHUP, and shells ignore SIGINT in what they
    start in the background.
    """

    def interrupt(number: int, _: object) -> None:
        raise Interrupted(number)

    def make_room(*_: object) -> None:
        raise preemption.Preempted

    handlers = {**dict.fromkeys(_INTERRUPTIONS, interrupt), signal.SIGUSR1: make_room}
    before = {number: signal.getsignal(number) for number in handlers}
    ours = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in ours:
            signal.signal(number, handlers[number])
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def mend_terminal() -> None:
    """Show the cursor and begin a line: rank 0 may have been ended in the middle of its progress bar."""
    if sys.stderr.isatty():
        print("\x1b[?25h", file=sys.stderr)
