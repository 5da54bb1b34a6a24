"""The directory of a run: what is where in it, and the claim that lets only one run at a time write to it."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIG, CHECKPOINTS, LOGS, HF_EXPORT, SERVERS = "config.yaml", "checkpoints", "logs", "hf", "servers"
ADAPTER = "adapter"
"""What a run with LoRA exports beside the merged student: the adapters alone, for peft."""
MARKER = "loop.json"
"""File of a checkpoint that is written last; without it there is no checkpoint."""
_LOCK = ".lock"


def make(run_dir: str | Path) -> Path:
    """The directory, made if it is not there. Raises ValueError when that is not possible."""
    path = Path(run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run.dir: {path} cannot be made: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"run.dir: {path} cannot be written to")
    return path


@contextmanager
def claimed(run_dir: str | Path) -> Iterator[Path]:
    """Hold the directory, made if need be, until this block or the process ends, however that comes about.

    Raises ValueError when another run holds it. File systems that know no locks are not guarded.
    """
    path = make(run_dir)
    with (path / _LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ValueError(
                f"run.dir: another run is writing to {path} ({lock.read().strip() or 'it did not say which'});"
                " wait for it, stop it, or set another run.dir"
            ) from None
        except OSError:
            pass
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield path
        lock.truncate(0)


def complete(checkpoints: Path) -> list[Path]:
    """The complete checkpoints in `<run.dir>/checkpoints`, oldest first."""
    return sorted(marker.parent for marker in checkpoints.glob(f"step_*/{MARKER}"))


def how_to_continue(run_dir: str | Path) -> str:
    """What the same command will do, for messages at the end of a run that did not finish."""
    newest = complete(Path(run_dir) / CHECKPOINTS)[-1:]
    return f"the same command continues from {newest[0]}" if newest else "the same command starts it again"
