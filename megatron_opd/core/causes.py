"""Why something failed, in words: what the operating system or torch says, and what to do about it.

torch and gloo put the operating system's words into errors of their own, so these are looked for in the text, too.
"""

from __future__ import annotations

import errno
import re
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cause:
    """A row of the table."""

    numbers: tuple[int, ...]
    """The operating system's numbers of it."""
    texts: str
    """A regular expression for the words of it, in any case."""
    advice: str
    """The cause and its remedy, in words. `{limit}` stands for the value of `limit`."""
    limit: int | None = None
    """One of the limits of a process."""


CAUSES = (
    Cause(
        (errno.EMFILE,),
        r"too many open files(?! in system)|failed to init uv loop",
        "this process may have no more open files than {limit}; raise the limit (`ulimit -n`)",
        resource.RLIMIT_NOFILE,
    ),
    Cause(
        (errno.ENFILE,),
        r"too many open files in system",
        "this machine can have no more open files; end what holds them, or have its limit raised (fs.file-max)",
    ),
    Cause(
        (errno.EADDRINUSE,),
        r"EADDRINUSE|address already in use",
        "another program has this address; end it, or take another port (MASTER_PORT of the ranks, servers.port)",
    ),
    Cause(
        (errno.ENOSPC,),
        r"no space left on device",
        "the disk is full, or the machine's memory for shared files (/dev/shm); make room there",
    ),
    Cause((errno.EDQUOT,), r"disk quota exceeded", "this user may take no more of the disk; make room there"),
    Cause(
        (errno.EFBIG,),
        r"file too large",
        "this process may write no larger files than {limit} bytes; raise the limit (`ulimit -f`)",
        resource.RLIMIT_FSIZE,
    ),
    Cause((errno.EROFS,), r"read-only file system", "nothing can be written there; take another directory"),
    Cause(
        (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN),
        r"input/output error|stale file handle|transport endpoint is not connected",
        "the disk or the network's file system fails; see the machine's own log",
    ),
    Cause(
        (),
        r"(CUDA|HIP) out of memory",
        "a GPU's memory is full; `megatron-opd check --plan` tells what the run needs and which settings lower it",
    ),
    Cause(
        (errno.EAGAIN,),
        r"can't start new thread|resource temporarily unavailable",
        "this user may have no more processes and threads than {limit}, or this machine or job no more; raise the limit"
        " (`ulimit -u`, pids.max of the cgroup)",
        resource.RLIMIT_NPROC,
    ),
    Cause(
        (errno.ENOMEM,),
        r"can(not|'t) allocate memory|not enough memory|unable to allocate|std::bad_alloc|failed to map segment",
        "memory ran out: the machine's, or what this process may have ({limit} bytes by `ulimit -v`)",
        resource.RLIMIT_AS,
    ),
)
"""The first that fits is told."""
_SHOWN = 300
"""Characters of an error's own words."""


def foreseen(error: Exception) -> str | None:
    """The message about it; None for an error that only a developer understands."""
    if isinstance(error, (ValueError, FloatingPointError)):
        return str(error)
    said = explain(error)
    return str(error) if said is None and isinstance(error, OSError) else said


def explain(error: BaseException) -> str | None:
    """The error in a line or two, with what to do about it; None where the table does not know it."""
    for link in _chain(error):
        if (cause := _cause(link)) is not None:
            said = (str(link).strip() or type(link).__name__).splitlines()[0][:_SHOWN]
            return f"{said}: {cause.advice.format(limit=_limit(cause.limit))}"
    return None


def advised(said: str) -> str:
    """An error's own words, with what to do about them where the table knows that."""
    cause = _by_words(said)
    return said if cause is None else f"{said}: {cause.advice.format(limit=_limit(cause.limit))}"


def is_full(said: str) -> bool:
    """Whether these are the words of an error for want of room on a disk."""
    cause = _by_words(said)
    return cause is not None and bool({errno.ENOSPC, errno.EDQUOT} & {*cause.numbers})


def ended(code: int) -> str:
    """How a process with this exit code ended; the number of a signal is negative."""
    return f"was ended by {signal_name(-code)}" if code < 0 else f"failed with exit code {code}"


def signal_name(number: int) -> str:
    """SIGKILL; a number for signals that have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _cause(error: BaseException) -> Cause | None:
    if isinstance(error, MemoryError):
        return next(cause for cause in CAUSES if errno.ENOMEM in cause.numbers)
    if isinstance(error, OSError) and error.errno is not None:
        return next((cause for cause in CAUSES if error.errno in cause.numbers), None)
    return _by_words(str(error))


def _by_words(said: str) -> Cause | None:
    return next((cause for cause in CAUSES if re.search(cause.texts, said, re.IGNORECASE)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised from or in the handling of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _limit(number: int | None) -> str:
    if number is None:
        return ""
    soft, _ = resource.getrlimit(number)
    return "any number of" if soft in (resource.RLIM_INFINITY, sys.maxsize) else f"{soft:,}"
