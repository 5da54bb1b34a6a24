"""The ranks of a run as processes of this machine: started together, watched, and ended together.

Nothing here opens a port, and nothing that a rank says is read. The supervisor knows its ranks by their process ids
and exit codes alone.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from megatron_opd.core import interrupts, lifeline

_GRACE_S = 5.0
"""How long ranks have for ending by themselves before they are killed. SIGTERM ends a rank at once, unless it is
stopped or the kernel holds it."""
_POLL_S = 0.1
_SETTLE_S = 0.3
"""How long the others are left alone once a rank has failed: ranks that fail together are all seen then, and so is a
signal that was meant for the whole run."""


class Handle(Protocol):
    """What the supervisor needs of a rank's process; subprocess.Popen has it."""

    @property
    def pid(self) -> int:
        """The process id, which is also the number of the rank's process group."""

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one. Raises subprocess.TimeoutExpired after `timeout` seconds."""

    def send_signal(self, sig: int) -> None:
        """Send it to the process. Does nothing when that has ended."""


Output = IO[bytes] | None
"""Where a rank writes to; None is this process's own."""
Start = Callable[[Mapping[str, str], Sequence[str], Output, Output], Handle]
"""Starts one rank: (environment, arguments of the interpreter, stdout, stderr) -> its process."""


def spawn(environment: Mapping[str, str], arguments: Sequence[str], stdout: Output, stderr: Output) -> Handle:
    """Start one rank in a new interpreter.

    It gets a session of its own, so that Ctrl-C reaches the launcher alone, and its helpers can be ended with it.
    """
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """How a rank ended, unless it ended well."""

    code: int
    """The exit code; negative for a signal."""
    when: float
    """Seconds on a monotonic clock at which it was noticed."""
    is_ours: bool = False
    """Whether the supervisor ended it, because of another rank."""
    log: Path | None = None
    """The file that it wrote to; None for the terminal."""


class Ranks:
    """`count` ranks of one program. Rank 0 writes to this terminal, rank N to <logs>/rank-N.log."""

    def __init__(
        self,
        arguments: Sequence[str],
        count: int,
        *,
        logs: Path,
        environment: Mapping[str, str] | None = None,
        start: Start = spawn,
    ) -> None:
        """`arguments` are the interpreter's, `environment` is for the ranks alone. Nothing is started yet."""
        self.count, self.logs = count, logs
        self.has_begun = False
        self._arguments, self._start = arguments, start
        self._environment = environment or {}
        self._handles: list[Handle] = []
        self._codes: dict[int, int] = {}
        self._failures: dict[int, Failure] = {}
        self._sent: dict[int, set[int]] = {rank: set() for rank in range(count)}

    def run(self, timeout_s: float = math.inf) -> dict[int, Failure]:
        """Start all ranks and wait for their end. When one fails, the others are ended.

        Returns the ranks that did not end well: none of them when the run is complete. Raises TimeoutError when it is
        not in `timeout_s`. That, or an exception that a signal handler raises meanwhile, ends all ranks, too.
        """
        self.has_begun = True
        deadline = time.monotonic() + timeout_s
        try:
            with ExitStack() as opened:
                for rank in range(self.count):
                    with interrupts.deferred():  # a rank that nobody knows of would outlive us, and have its say
                        self._handles.append(self._begin(rank, opened))
            while self._look() and not self._failures:
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(_POLL_S)
            if self._failures:
                time.sleep(_SETTLE_S)
                self._look()
        finally:
            self._end()
        return dict(self._failures)

    def send(self, number: int) -> None:
        """Pass a signal on to every rank that runs."""
        for handle in self._handles:
            handle.send_signal(number)

    def _begin(self, rank: int, opened: ExitStack) -> Handle:
        output = None
        if (log := self._log(rank)) is not None:
            self.logs.mkdir(parents=True, exist_ok=True)
            output = opened.enter_context(log.open("ab"))
        environment = {
            **os.environ,
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
            **self._environment,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.count),
            "LOCAL_WORLD_SIZE": str(self.count),
            "MASTER_ADDR": "127.0.0.1",
            lifeline.LAUNCHER: str(os.getpid()),
        }
        return self._start(environment, self._arguments, output, output)

    def _log(self, rank: int) -> Path | None:
        return self.logs / f"rank-{rank}.log" if rank else None

    def _look(self) -> bool:
        """Note the ranks that have ended; returns whether one still runs."""
        for rank, handle in enumerate(self._handles):
            if rank in self._codes or (code := handle.poll()) is None:
                continue
            self._codes[rank] = code
            if code:
                is_ours = -code in self._sent[rank]
                log = self._log(rank)
                self._failures[rank] = Failure(code=code, when=time.monotonic(), is_ours=is_ours, log=log)
        return len(self._codes) < len(self._handles)

    def _end(self) -> None:
        """End what runs: politely at first, then by force, with every helper of the ranks."""
        try:
            self._signal(signal.SIGTERM)
            deadline = time.monotonic() + _GRACE_S
            while self._look() and time.monotonic() < deadline:
                time.sleep(_POLL_S / 2)
        finally:  # also when somebody is impatient, and interrupts the launcher once more
            self._signal(signal.SIGKILL)
            for handle in self._handles:
                with suppress(subprocess.TimeoutExpired):  # the kernel holds it, and nobody can do anything about it
                    handle.wait(_GRACE_S)
            self._look()

    def _signal(self, number: signal.Signals) -> None:
        for rank, handle in enumerate(self._handles):
            if rank not in self._codes:
                self._sent[rank].add(number)
            with suppress(ProcessLookupError):
                os.killpg(handle.pid, number)
