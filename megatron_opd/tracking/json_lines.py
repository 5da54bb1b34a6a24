"""Files of JSON lines that a run appends to, and what power cuts, full disks and editors do to them.

A line that can be read is a row, an object with a whole number `step`. A last line without an end was being written
when the run was killed. Any other line that is no row is damaged: a resume takes it out of the file into
`<name>.damaged`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_opd.core.whole_file import write_whole

_T = TypeVar("_T")
_NO_ROW = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
_NAMED = 5
"""Numbers of lines that a message names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    """A file's lines; those of `rows` and `damaged` have their end."""

    rows: list[tuple[bytes, dict[str, Any]]]
    damaged: list[tuple[int, bytes]]
    """With their numbers, from 1."""
    unfinished: bytes
    """The bytes behind the last end of a line."""


def row(line: bytes) -> dict[str, Any]:
    """Raises ValueError for what is no row."""
    try:
        found = json.loads(line)
        if isinstance(found, dict) and type(found["step"]) is int:
            return found
    except _NO_ROW:
        pass
    raise ValueError("it is no JSON object with a step")


def parse(data: bytes, read: Callable[[bytes], dict[str, Any]] = row) -> Lines:
    """The lines of a file; `read` makes a row of one, or raises ValueError."""
    *lines, unfinished = data.split(b"\n")  # not by splitlines: texts may hold other ends
    rows, damaged = [], []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append((line + b"\n", read(line)))
        except ValueError:
            damaged.append((number, line + b"\n"))
    return Lines(rows=rows, damaged=damaged, unfinished=unfinished)


def rewind(
    path: Path, step: int, read: Callable[[bytes], dict[str, Any]] = row, *, unfinished: bytes = b""
) -> tuple[list[dict[str, Any]], list[str]]:
    """Take the rows after `step` and what is no row out of a file; returns the rows that stay, and lines for the log.

    `unfinished` was cut off its end before. A last line that only lacks its end stays. Damaged lines go to
    `<name>.damaged`. Raises OSError.
    """
    found = parse(path.read_bytes(), read)
    unfinished = unfinished or found.unfinished
    kept = [(line, one) for line, one in found.rows if one["step"] <= step]
    notes = []
    if unfinished:
        whole = parse(unfinished + b"\n", read).rows
        kept += [(line, one) for line, one in whole if one["step"] <= step]
        if not whole:
            notes.append(f"{path}: dropped its last line, which was cut short after {len(unfinished)} bytes")
    if found.damaged:
        aside = path.with_name(f"{path.name}.damaged")
        with aside.open("ab") as file:
            file.writelines(line for _, line in found.damaged)
        numbers = ", ".join(str(number) for number, _ in found.damaged[:_NAMED])
        more = f" and {len(found.damaged) - _NAMED} more" if len(found.damaged) > _NAMED else ""
        notes.append(f"{path}: moved what is no row to {aside.name}: line {numbers}{more}")
    write_whole(path, b"".join(line for line, _ in kept))
    return [one for _, one in kept], notes


def missing(path: Path, kept: list[dict[str, Any]], last: int) -> list[str]:
    """A line for the log where a file that should have rows up to the step `last` ends before."""
    end = kept[-1]["step"] if kept else 0
    return [f"{path}: there are no rows after step {end}, though the run is at step {last}"] if end < last else []
