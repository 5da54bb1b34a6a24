"""Runs code that nobody has read: in processes of its own, with limits, without network, against tests.

What confines it is in `jail/`, which a fresh interpreter runs; nothing of the code is ever parsed or run in this
process. Which guards the kernel has is in every verdict; without one that cuts the network off nothing is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from typing import IO, Any

JAIL = Path(__file__).with_name("jail")
GUARDS = ("namespaces", "landlock", "seccomp")
_MAX_VERDICT = 8192
_REMOVAL_S = 600.0
LOOK_AT_FILES_S = 0.05
_BYTES_AN_ENTRY = 4096
"""A file that is empty takes space, too."""
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
    total_mb: int = 64
    """Size of all files together."""
    processes: int = 64
    """Processes and threads, in a user namespace and where the user is not root."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Code and what it must do."""

    programs: tuple[str, ...] = ()
    """Programs; the first that defines the entry point is the one."""
    answer: str | None = None
    """Text of an answer to `prompt`, read as jail/programs.py says; its readings come behind `programs`."""
    tests: str
    """Python: asserts, `check(candidate)`, which is called with the entry point, or tests as pytest and unittest
    find them. They must call the code."""
    entry_point: str | None = None
    """The function that is tested; None: the tests call what they know by name."""
    prompt: str = ""
    """The prompt. Where it is Python, the code may continue it, and the tests may use its functions."""


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
    said = _said(task, limits, guards, is_probe=False)
    if said is None:
        return Verdict(passed=False, why=_no_verdict(limits))
    return Verdict(passed=said["passed"] is True, why=said["why"], guards=tuple(said["guards"]))


def probe(task: Task, limits: SandboxLimits) -> str | None:
    """Why the tests cannot tell answers apart, whatever they are, or None when they can.

    The tests run against made-up functions; `task.programs` and `task.answer` are not looked at. Tests that do not end
    in time count as those that can fail. Raises SandboxError like `run`.
    """
    said = _said(task, limits, GUARDS, is_probe=True)
    return None if said is None or said["passed"] is True else str(said["why"])


def _no_verdict(limits: SandboxLimits) -> str:
    return f"no verdict within {limits.timeout_s:g} s, {limits.memory_mb} MB and {limits.total_mb} MB of files"


def _said(task: Task, limits: SandboxLimits, guards: tuple[str, ...], *, is_probe: bool) -> dict[str, Any] | None:
    """What the jail says; None when it says nothing."""
    content = dataclasses.asdict(task) | {"probe": is_probe}
    with home_of_code() as home:
        said = _run(content, settings_of(limits, guards), home, limits)
    if said is not None and "refused" in said:
        raise SandboxError(f"code cannot be run here: {said['refused']}")
    return said


@contextlib.contextmanager
def home_of_code() -> Iterator[str]:
    """A directory for one task or session, gone afterwards."""
    home = tempfile.TemporaryDirectory(prefix="opd-code-", ignore_cleanup_errors=True)
    try:
        yield home.name
    finally:
        try:
            home.cleanup()
        except RecursionError:  # directories in directories: Python's removal calls itself for each
            subprocess.run(["rm", "-rf", "--", home.name], stderr=subprocess.DEVNULL, timeout=_REMOVAL_S)


def settings_of(limits: SandboxLimits, guards: tuple[str, ...]) -> dict[str, Any]:
    """The settings by which the jail confines a process."""
    paths = sysconfig.get_paths()
    own = [paths["stdlib"], paths["platstdlib"], str(Path(sys.base_prefix) / "lib")]
    most = {
        "cpu_s": math.ceil(limits.timeout_s),
        "memory_bytes": limits.memory_mb * 2**20,
        "file_bytes": limits.file_mb * 2**20,
        "processes": limits.processes,
    }
    total = limits.total_mb * 2**20
    return {"guards": guards, "limits": most, "total_bytes": total, "readable": [*own, *_READABLE]}


def _run(content: dict[str, Any], settings: dict[str, Any], home: str, limits: SandboxLimits) -> dict[str, Any] | None:
    """What the jail says, or None when it says nothing in time."""
    with tempfile.TemporaryFile() as stdin:  # has no name, so the code cannot find the tests in it
        stdin.write(json.dumps(content).encode())
        stdin.seek(0)
        process = start(settings, home, stdin)
    try:
        said = _read(process, limits, home)
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


def start(settings: dict[str, Any], home: str, stdin: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """The jail, in a process group of its own. It ends with the thread that starts it."""
    # As -I, but for the one variable of Python's: sets have the same order in every process.
    return subprocess.Popen(
        [sys.executable, "-s", "-P", "-S", "-B", "-X", "utf8", JAIL, json.dumps(settings)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=home,
        env={"HOME": home, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},  # nothing of ours: it may hold keys
        start_new_session=True,
    )


def is_ready(stream: int, events: int, timeout_s: float) -> bool:
    """Whether a file descriptor of any number is ready, or at its end, within so many seconds."""
    waiting = select.poll()
    waiting.register(stream, events)
    return bool(waiting.poll(max(timeout_s, 0) * 1000))


def _read(process: subprocess.Popen, limits: SandboxLimits, home: str) -> bytes:
    """The output up to its end, to the deadline, to too many files, or to what is longer than any verdict."""
    said, deadline = b"", time.monotonic() + limits.timeout_s
    while len(said) < _MAX_VERDICT:
        left = max(deadline - time.monotonic(), 0)
        ready = is_ready(process.stdout.fileno(), select.POLLIN, min(left, LOOK_AT_FILES_S))
        if not ready and left > 0 and bytes_in(home) <= limits.total_mb * 2**20:
            continue
        part = os.read(process.stdout.fileno(), _MAX_VERDICT) if ready else b""
        if not part:
            break
        said += part
    return said


def bytes_in(home: str) -> int:
    """Disk space of all files in a directory, as far as it can be looked at. In namespaces they are on a disk of their
    own, which is limited by itself and cannot be seen from here."""
    total, folders = 0, [home]
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512 + _BYTES_AN_ENTRY
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
    return total
