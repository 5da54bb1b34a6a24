"""The checkpoint that a run loads: the newest, if it is whole; on demand, the newest of those that are.

Nothing is removed here: what is passed over is renamed to `step_00000040.damaged`, so that the run can save there
again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_opd.core import durable, hashed_files
from megatron_opd.core.marker import DamagedMarker
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.run_dir import MARKER, complete, saves
from megatron_opd.student import checkpoint_files


class CheckpointError(ValueError):
    """A checkpoint cannot be written, is damaged or does not belong to this run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How checkpoints are read; both functions are called on rank 0."""

    marker: Callable[[Path], dict[str, Any]]
    """loop.json. Raises DamagedMarker, and CheckpointError for a checkpoint of another student."""
    headers: Callable[[Path], None]
    """Reads what is small in it. Raises CheckpointError for what is damaged or not to be trusted."""
    contents: bool
    """Whether hashes are compared, or sizes only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """A checkpoint that can be loaded."""

    path: Path
    loop: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """Lines for the log."""


def find(directory: Path, reading: Reading, parallel: Parallel, *, skip_damaged: bool) -> Whole | None:
    """The checkpoint in `directory` to continue from; None when there is none at all. Collective.

    Raises CheckpointError on rank 0 (PeerError on the others) when the newest is damaged; with `skip_damaged`, only
    when none is whole.
    """
    damaged: list[tuple[Path, str]] = []
    found: Whole | None = None
    for path in reversed(parallel.share_world(lambda: complete(directory))):
        checked = _check(path, reading, parallel)
        if isinstance(checked, Whole):
            found = checked
            break
        damaged.append((path, checked))
    if damaged and (found is None or not skip_damaged):
        parallel.share_world(lambda: _refuse(damaged, found))
    if found is None:
        return None
    whole = found
    begun = parallel.share_world(lambda: _cut_short(directory, whole.path))
    kept = parallel.share_world(lambda: [_set_aside(path, reason) for path, reason in damaged])
    return Whole(path=whole.path, loop=whole.loop, notes=[*kept, *begun, *whole.notes])


def _check(path: Path, reading: Reading, parallel: Parallel) -> Whole | str:
    """The checkpoint, or why it is damaged. Collective."""
    loop = parallel.share_world(lambda: _or_reason(DamagedMarker, lambda: reading.marker(path)))
    if isinstance(loop, str):
        return loop
    recorded = loop.pop(hashed_files.KEY, None)
    files = hashed_files.parsed(recorded)
    if recorded is not None and files is None:
        return f"{MARKER}: {hashed_files.KEY} is not what a save writes"
    if files is not None:
        wrong = checkpoint_files.differences(path, files, parallel, contents=reading.contents)
        if wrong:
            return wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
    reason = parallel.share_world(lambda: _or_reason(CheckpointError, lambda: reading.headers(path)))
    if isinstance(reason, str):
        return reason
    return Whole(path=path, loop=loop, notes=parallel.share_world(lambda: _remarks(path, files, reading.contents)))


def _remarks(path: Path, files: hashed_files.Files | None, contents: bool) -> list[str]:
    """Lines for the log about what was not compared."""
    if files is None:
        return [f"{path} was saved without hashes, by an older version: damage in its files may go unnoticed"]
    notes = []
    if contents and any(file["blake2b"] is None for file in files.values()):
        notes.append(f"{path} was saved without hashes (train.verify_checkpoints): only sizes could be compared")
    if others := checkpoint_files.strangers(path, files):
        notes.append(f"{path} holds {', '.join(others)}, which no save wrote there and nothing reads")
    return notes


def _or_reason(kind: type[Exception], read: Callable[[], Any]) -> Any:
    try:
        return read()
    except kind as error:
        return str(error)


def _refuse(damaged: list[tuple[Path, str]], whole: Whole | None) -> None:
    path, reason = damaged[0]
    if whole is not None:
        advice = (
            f"{whole.path} is whole: train.resume_from=newest-valid continues from it, and keeps the damaged one under"
            " another name"
        )
    elif len(damaged) > 1:
        older, its_reason = damaged[-1]
        advice = f"no older one is whole ({older.name}: {its_reason}); to start again, give this run another run.dir"
    else:
        advice = "it is the only one; to start again, give this run another run.dir"
    raise CheckpointError(f"the checkpoint {path} is damaged: {reason}; {advice}")


def _set_aside(path: Path, reason: str) -> str:
    """Rename a damaged checkpoint; returns the line about it."""
    aside = path.with_name(f"{path.name}.damaged")
    number = 2
    while aside.exists():
        aside = path.with_name(f"{path.name}.damaged{number}")
        number += 1
    path.rename(aside)
    durable.sync(path.parent)
    return f"passed over {path}, which is damaged: {reason}; it is kept as {aside.name}"


def _cut_short(directory: Path, used: Path) -> list[str]:
    """A line a directory that is newer than the one used and no checkpoint."""
    whole = complete(directory)
    later = [path for path in saves(directory) if path.name > used.name and path not in whole]
    return [f"{path} has no loop.json: its save was cut short, and the next one removes it" for path in later]
