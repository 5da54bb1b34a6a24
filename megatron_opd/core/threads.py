"""Room for the threads of process groups: a process that lacks it learns so before gloo does."""

from __future__ import annotations

import threading

_OF_GROUPS = 96
"""More than the 61 to 73 threads that ranks of the quickstart were seen with."""


def check_room(count: int = _OF_GROUPS) -> None:
    """Start so many threads at once, and end them: some milliseconds.

    Raises RuntimeError ("can't start new thread") at a limit of processes, threads or address space. Torch 2.13 makes a
    group of gloo with two threads, and waits for ever where the second cannot be started.
    """
    end, started = threading.Event(), []
    try:
        for _ in range(count):
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            started.append(thread)
    finally:
        end.set()
        for thread in started:
            thread.join()
