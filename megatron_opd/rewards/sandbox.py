"""Runs code that nobody has read: in processes of its own, with limits, without network, against tests.

What confines it is in `jail/`, which a fresh interpreter runs; nothing of the code is ever parsed or run in this
process. Which guards the kernel has is in every verdict; without one that cuts the network off nothing is run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JAIL = Path(__file__).with_name("jail")
GUARDS = ("namespaces", "landlock", "seccomp")
_MAX_VERDICT = 8192
_REMOVAL_S = 600.0
_READABLE = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/dev/urandom")


class SandboxError(ValueError):
    """The machine cannot confine code well enough to run it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxLimits:
    """What one task may use."""

    timeout_s: float = 10.0
    """Wall time; CPU time is limited to the same, rounded up."""
    memory_mb: int = 512
    """Address space of each of the two processes."""
    file_mb: int = 16
    """Size of a file."""
    processes: int = 64
    """Processes and threads, in a user namespace and where the user is not root."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Code and what it must do."""

    programs: tuple[str, ...]
    """Ways to read the code as a program; the first that runs and defines the entry point is the one."""
    tests: str
    """Python: asserts, or a function `check(candidate)` that is called with the entry point."""
    entry_point: str | None = None
    """The function that is tested; None: the tests call what they know by name."""
    prompt: str = ""
    """Python that the tests may use functions of, where it is Python."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether the tests passed."""

    passed: bool
    why: str
    """Why not, in the words of the exception; empty when they passed."""
    guards: tuple[str, ...] = ()
    """What confined the code besides the limits; empty when it was ended by force."""


def run(task: Task, limits: SandboxLimits, *, guards: tuple[str, ...] = GUARDS) -> Verdict:
    """Test the code. `guards`: those to use where the kernel has them.

    Raises SandboxError, and has run nothing, when the network cannot be cut off.
    """
    with _home() as home:
        said = _run(task, _settings(limits, guards), home, limits.timeout_s)
    if said is None:
        return Verdict(passed=False, why=f"no verdict within {limits.timeout_s:g} s and {limits.memory_mb} MB")
    if "refused" in said:
        raise SandboxError(f"code cannot be run here: {said['refused']}")
    return Verdict(passed=said["passed"] is True, why=said["why"], guards=tuple(said["guards"]))


@contextlib.contextmanager
def _home() -> Iterator[str]:
    """A directory for one task, gone afterwards."""
    home = tempfile.TemporaryDirectory(prefix="opd-code-", ignore_cleanup_errors=True)
    try:
        yield home.name
    finally:
        try:
            home.cleanup()
        except RecursionError:  # directories in directories: Python's removal calls itself for each
            subprocess.run(["rm", "-rf", "--", home.name], stderr=subprocess.DEVNULL, timeout=_REMOVAL_S)


def _settings(limits: SandboxLimits, guards: tuple[str, ...]) -> dict[str, Any]:
    paths = sysconfig.get_paths()
    own = [paths["stdlib"], paths["platstdlib"], str(Path(sys.base_prefix) / "lib")]
    most = {
        "cpu_s": math.ceil(limits.timeout_s),
        "memory_bytes": limits.memory_mb * 2**20,
        "file_bytes": limits.file_mb * 2**20,
        "processes": limits.processes,
    }
    return {"guards": guards, "limits": most, "readable": [*own, *_READABLE]}


def _run(task: Task, settings: dict[str, Any], home: str, timeout_s: float) -> dict[str, Any] | None:
    """What the jail says, or None when it says nothing in time."""
    content = {"programs": task.programs, "tests": task.tests, "entry_point": task.entry_point, "prompt": task.prompt}
    with tempfile.TemporaryFile() as stdin:  # has no name, so the code cannot find the tests in it
        stdin.write(json.dumps(content).encode())
        stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", JAIL, json.dumps(settings)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=home,
            env={"HOME": home, "LANG": "C.UTF-8"},  # nothing of ours: it may hold keys
            start_new_session=True,
        )
    try:
        said = _read(process, timeout_s)
    finally:
        # Before the process is waited for: until then nobody else can get its number.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    try:
        return json.loads(said)
    except ValueError:
        return None


def _read(process: subprocess.Popen, timeout_s: float) -> bytes:
    """The output up to its end, to the deadline or to what is longer than any verdict."""
    said, deadline = b"", time.monotonic() + timeout_s
    while len(said) < _MAX_VERDICT:
        ready, _, _ = select.select([process.stdout], [], [], max(deadline - time.monotonic(), 0))
        part = os.read(process.stdout.fileno(), _MAX_VERDICT) if ready else b""
        if not part:
            break
        said += part
    return said
