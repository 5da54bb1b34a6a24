"""One command under a limit, with everything it started ended after it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

_GRACE_S = 5.0
"""Time that a command has to end by itself after SIGTERM."""


def run(command: list[str], *, log: Path, limit_s: float, env: dict[str, str]) -> tuple[int | None, float]:
    """(exit code, seconds); no code when it took longer than `limit_s`. Its output goes to `log`.

    It is the head of a process group of its own, within this session: whoever ends the session ends it too.
    """
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env, process_group=0
        )
        try:
            return process.wait(limit_s), time.monotonic() - started
        except subprocess.TimeoutExpired:
            return None, time.monotonic() - started
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the group, gently where the command itself still runs."""
    if process.poll() is None:
        _signal(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    _signal(process.pid, signal.SIGKILL)
    process.wait()


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(group, number)
