"""The directory of a run: what is where in it, and the claim that lets only one run at a time write to it."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIG, CHECKPOINTS, LOGS, HF_EXPORT, SERVERS = "config.yaml", "checkpoints", "logs", "hf", "servers"
COMPLETIONS = "completions.jsonl"
"""Answers for people, a line each."""
ADAPTER = "adapter"
"""What a run with LoRA exports beside the merged student: the adapters alone, for peft."""
BEST, BEST_ADAPTER, BEST_RECORD = "best", "best_adapter", "best.json"
"""The same of the weights that were best (`train.save_best`), and which these are."""
MARKER = "loop.json"
"""File of a checkpoint that is written last; without it there is no checkpoint."""
LOCK = ".lock"
_STEP = re.compile(r"step_[0-9]+")


def make(run_dir: str | Path) -> Path:
    """The directory, made if it is not there. Raises ValueError when that is not possible."""
    path = Path(run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run.dir: {path} cannot be created: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"run.dir: {path} cannot be written to")
    return path


@contextmanager
def claimed(run_dir: str | Path) -> Iterator[Path]:
    """Hold the directory, made if need be, until this block or the process ends, however that comes about.

    Raises ValueError when another run holds it. File systems that know no locks are not guarded.
    """
    path = make(run_dir)
    with (path / LOCK).open("a+") as lock:
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


def saves(checkpoints: Path) -> list[Path]:
    """What saves have made or begun in `<run.dir>/checkpoints`, oldest first. Other names, `step_00000100_best`, are
    somebody's own copies: no run continues from them, and none removes them. Nor is a file a save."""
    found = [path for path in checkpoints.glob("step_*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def remove_save(path: Path) -> None:
    """Remove what a save has made or begun. Of a link, which no save makes, the link alone: what it leads to is
    somebody's own."""
    if path.is_symlink():
        path.unlink()
        return
    (path / MARKER).unlink(missing_ok=True)  # from here on it is no checkpoint, however far the removal gets
    shutil.rmtree(path, ignore_errors=True)


def complete(checkpoints: Path) -> list[Path]:
    """The complete checkpoints in `<run.dir>/checkpoints`, oldest first."""
    return [path for path in saves(checkpoints) if (path / MARKER).is_file()]


def how_to_continue(run_dir: str | Path) -> str:
    """What the same command will do, for messages at the end of a run that did not finish."""
    newest = complete(Path(run_dir) / CHECKPOINTS)[-1:]
    return f"the same command continues from {newest[0]}" if newest else "the same command starts it again"
