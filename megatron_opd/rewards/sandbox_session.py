"""A Python session in the sandbox: cells that run one after the other in one namespace, each with a time limit.

The confinement is that of `sandbox.py`. Between two cells the process is stopped, so nothing goes on in it. What it
says is a text and nothing more; whatever else comes over the pipe ends the session.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from megatron_opd.rewards import sandbox
from megatron_opd.rewards.sandbox import GUARDS, SandboxError, SandboxLimits

_BYTES_A_CHARACTER = 12
"""At most, as JSON writes them."""
_FRAME_BYTES = 4096
_START_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """The text that a cell printed, with the value of its last expression or the exception that ended it."""

    text: str
    has_failed: bool


class SessionEnded(Exception):
    """The session is over, and all that the code had defined is gone."""

    def __init__(self, reason: Literal["timeout", "died"]) -> None:
        super().__init__(reason)
        self.reason = reason


class SandboxSession:
    """One session, which begins with its first cell. `close` may be called from any thread, also during a cell."""

    def __init__(self, limits: SandboxLimits, *, characters: int, guards: tuple[str, ...] = GUARDS) -> None:
        """`limits.timeout_s` is the CPU time of all cells together; of longer outputs than `characters` the middle is
        left out. `guards`: those to use where the kernel has them."""
        self.guards: tuple[str, ...] = ()
        """Guards that confine the code besides the limits, once it runs."""
        self._limits, self._characters = limits, characters
        self._settings = sandbox.settings_of(limits, guards) | {"notebook": {"characters": characters}}
        self._number = 0
        self._is_over = False
        self._running, self._process_lock = threading.Lock(), threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._resources = contextlib.ExitStack()
        self._home = ""

    def run(self, code: str, timeout_s: float, *, with_start_s: float = _START_S) -> Said:
        """Run a cell, within so many seconds of wall time, and with the session's start within `with_start_s`.

        Raises SessionEnded when it does not come to an end, and SandboxError, having run nothing, when the network
        cannot be cut off.
        """
        last = time.monotonic() + max(with_start_s, timeout_s)
        with self._running:
            try:
                if self._process is None:
                    self._begin(last)
                said = self._asked(code, min(time.monotonic() + timeout_s, last))
            except BaseException:
                self._end()
                raise
            self._signal(signal.SIGSTOP)
            return said

    def close(self) -> None:
        """End the session and leave nothing of it behind."""
        self._is_over = True
        self._signal(signal.SIGKILL)  # a cell that runs in another thread ends with it
        with self._running:
            self._end()

    def _begin(self, deadline: float) -> None:
        if self._is_over:
            raise SessionEnded("died")
        self._home = self._resources.enter_context(sandbox.home_of_code())
        # The process dies with the thread that starts it, and the one here may end before the next cell.
        starting = _starter(os.getpid()).submit(sandbox.start, self._settings, self._home, subprocess.PIPE)
        with self._process_lock:
            self._process = starting.result()
        os.set_blocking(self._stdin, False)
        if self._is_over:
            raise SessionEnded("died")
        hello = self._received(deadline)
        if "refused" in hello:
            raise SandboxError(f"code cannot be run here: {hello['refused']}")
        self.guards = tuple(map(str, hello.get("guards", ())))

    def _asked(self, code: str, deadline: float) -> Said:
        if self._is_over or sandbox.is_ready(self._stdout, select.POLLIN, 0):  # nobody has asked for that
            raise SessionEnded("died")
        self._number += 1
        self._signal(signal.SIGCONT)
        self._send(json.dumps({"number": self._number, "code": code}).encode() + b"\n", deadline)
        reply = self._received(deadline)
        number, text, failed = reply.get("number"), reply.get("text"), reply.get("failed")
        if type(number) is not int or number != self._number or type(text) is not str or type(failed) is not bool:
            raise SessionEnded("died")
        return Said(text=shortened(text.encode("utf-8", "replace").decode(), self._characters), has_failed=failed)

    def _send(self, message: bytes, deadline: float) -> None:
        while message:
            if not sandbox.is_ready(self._stdin, select.POLLOUT, deadline - time.monotonic()):
                raise SessionEnded("timeout")
            try:
                message = message[os.write(self._stdin, message) :]
            except BlockingIOError:
                continue
            except OSError:
                raise SessionEnded("died") from None

    def _received(self, deadline: float) -> dict[str, Any]:
        """The one line that the process says."""
        most, line = _FRAME_BYTES + _BYTES_A_CHARACTER * self._characters, b""
        while not line.endswith(b"\n"):
            left_s = deadline - time.monotonic()
            if sandbox.is_ready(self._stdout, select.POLLIN, min(left_s, sandbox.LOOK_AT_FILES_S)):
                part = os.read(self._stdout, most)
                line += part
                if not part or len(line) > most:
                    raise SessionEnded("died")
            elif left_s <= 0:
                raise SessionEnded("timeout")
            elif sandbox.bytes_in(self._home) > self._limits.total_mb * 2**20:
                raise SessionEnded("died")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise SessionEnded("died") from None
        if not isinstance(message, dict):
            raise SessionEnded("died")
        return message

    @property
    def _stdin(self) -> int:
        return self._process.stdin.fileno()

    @property
    def _stdout(self) -> int:
        return self._process.stdout.fileno()

    def _signal(self, number: signal.Signals) -> None:
        with self._process_lock, contextlib.suppress(ProcessLookupError):
            # Until a process is waited for, nobody else can get its number.
            if self._process is not None and self._process.returncode is None:
                os.killpg(self._process.pid, number)

    def _end(self) -> None:
        self._is_over = True
        self._signal(signal.SIGKILL)
        with self._process_lock:
            if self._process is not None and self._process.returncode is None:
                self._process.wait()
                self._process.stdout.close()
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
        self._resources.close()


@functools.cache
def _starter(process: int) -> ThreadPoolExecutor:
    """The thread that starts this process's sessions, and lives as long as it does."""
    return ThreadPoolExecutor(1, thread_name_prefix="sandbox-start")


def shortened(text: str, characters: int) -> str:
    """The text, of which the middle is left out where it has many more characters."""
    if len(text) <= characters + _FRAME_BYTES:
        return text
    half = characters // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters are left out]\n{text[len(text) - half :]}"
