"""The lines of train.log and of a console without a bar, and those of them that come before a rank runs.

A run says what it does within a second of the command, before anything slow is imported.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_opd.core import run_dir as directory

LOG_FILE = "train.log"


def for_console(text: str) -> str:
    """A line as the console shows it."""
    return f"{time.strftime('%H:%M:%S')}  {text}"


def for_file(text: str) -> str:
    """A line as train.log has it."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n"


def say(run_dir: str | Path, text: str) -> None:
    """A line for people, on the console and in the train.log of a run whose directory is there."""
    print(for_console(text), file=sys.stderr, flush=True)
    if Path(run_dir).is_dir():
        with suppress(OSError):  # the tracker, which opens the file for good, says what is wrong
            _append(Path(run_dir), for_file(text))


def say_early(run_dir: str | Path, text: str) -> None:
    """As `say`, before the run has claimed its directory: the train.log of another run that has it is left alone."""
    print(for_console(text), file=sys.stderr, flush=True)
    if Path(run_dir).is_dir():
        _append_if_free(Path(run_dir), for_file(text))


@contextmanager
def checking(run_dir: str | Path, text: str) -> Iterator[None]:
    """Say the first line of a run while the block checks its settings.

    The line is in train.log too, unless another run has the directory or there can be none, which whoever starts the
    run says. When the block fails, nothing is left of a directory that was made for the line.
    """
    print(for_console(text), file=sys.stderr, flush=True)
    path = Path(run_dir)
    made = [path, *path.parents][: sum(not parent.exists() for parent in (path, *path.parents))]
    line = for_file(text)
    _append_if_free(path, line)
    try:
        yield
    except BaseException:
        with suppress(OSError, ValueError):  # somebody has put something there, or another run has it by now
            _take_back(path, made, line)
        raise


def _append_if_free(run_dir: Path, line: str) -> None:
    with suppress(OSError, ValueError), directory.claimed(run_dir):
        _append(run_dir, line)


def _append(run_dir: Path, line: str) -> None:
    with (run_dir / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(line)


def _take_back(run_dir: Path, made: list[Path], line: str) -> None:
    """Remove directories that were made for a first line, from the innermost outwards.

    Raises ValueError where another run has the directory; one that had it in between has left lines of its own.
    """
    if run_dir in made:
        with directory.claimed(run_dir):
            if (run_dir / LOG_FILE).read_text(encoding="utf-8") != line:
                return
            (run_dir / LOG_FILE).unlink()
            (run_dir / directory.LOCK).unlink()
    for path in made:
        path.rmdir()
