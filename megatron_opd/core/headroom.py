"""Room for the threads and open files of process groups: a process that lacks it learns so before gloo does."""

from __future__ import annotations

import os
import threading

_THREADS = 96
"""More than the 61 to 73 threads that ranks of the quickstart were seen with."""
_FILES = 64
"""Open files, beside those that a rank has when its groups begin."""


def check() -> None:
    """Start so many threads and open so many files at once, and end them: some milliseconds.

    Raises RuntimeError ("can't start new thread") at a limit of processes, threads or address space, and OSError
    (EMFILE) at one of open files. Torch 2.13 makes a group of gloo with two threads, and waits for ever where the
    second cannot be started; where gloo's listener can accept no connection, the process is aborted without a word of
    the limit.
    """
    _start_threads(_THREADS)
    _open_files(_FILES)


def _start_threads(count: int) -> None:
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


def _open_files(count: int) -> None:
    opened: list[int] = []
    try:
        opened.extend(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(count))
    finally:
        for descriptor in opened:
            os.close(descriptor)
