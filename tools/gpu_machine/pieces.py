"""Files into folders of a limited size and back: a file above the limit is cut into parts, which `join` puts together.

Parts are called NAME.part-1-of-3; beside each lies NAME.sha256 with the checksum of the whole file.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

_PART = re.compile(r"(.+)\.part-(\d+)-of-(\d+)")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A file, or a part of one, and the folder that it goes to."""

    source: Path
    folder: int
    """Number of the folder, from 1."""
    start: int
    size: int
    """Bytes, from `start` on."""
    name: str


@dataclass
class _Folders:
    """Room in the folders so far."""

    limit: int
    used: list[int] = field(default_factory=list)

    def place(self, size: int, first: int) -> int:
        """The number of the first folder from `first` on with room for so many bytes; a new one if none has."""
        for number in range(first, len(self.used) + 1):
            if self.used[number - 1] + size <= self.limit:
                self.used[number - 1] += size
                return number
        self.used.append(size)
        return len(self.used)


def plan(groups: list[list[Path]], limit: int) -> list[Piece]:
    """Where every file goes. A group begins with a folder of its own, so that the first ones do for what needs no more.
    `limit` is in bytes; a sum of checksums is too small to count."""
    folders, pieces = _Folders(limit), list[Piece]()
    for group in groups:
        first = len(folders.used) + 1
        for file in sorted(group, key=lambda file: (-file.stat().st_size, file.name)):
            size = file.stat().st_size
            parts = max(1, -(-size // limit))
            for number in range(parts):
                start = number * limit
                length = min(limit, size - start)
                name = f"{file.name}.part-{number + 1}-of-{parts}" if parts > 1 else file.name
                pieces.append(Piece(file, folders.place(length, first), start, length, name))
    return sorted(pieces, key=lambda piece: piece.folder)


def write(pieces: list[Piece], into: Path) -> None:
    """Write the pieces to into/1, into/2, …; folders of numbers that are there already are replaced."""
    for folder in into.glob("[0-9]*"):
        shutil.rmtree(folder)
    for piece in pieces:
        folder = into / str(piece.folder)
        folder.mkdir(parents=True, exist_ok=True)
        with piece.source.open("rb") as source, (folder / piece.name).open("wb") as target:
            source.seek(piece.start)
            left = piece.size
            while left:
                left -= target.write(source.read(min(left, _BLOCK)))
        if piece.name != piece.source.name:
            (folder / f"{piece.source.name}.sha256").write_text(checksum(piece.source) + "\n")


def carried(folder: Path, pattern: str) -> list[Path]:
    """Files of such names in a folder and in what `write` made in it."""
    return sorted([*folder.glob(pattern), *folder.glob(f"[0-9]*/{pattern}")], key=lambda file: file.name)


def join(folder: Path, into: Path) -> tuple[list[Path], list[str]]:
    """(files put together from the parts in `folder` and its numbered folders, a line for each that lacks parts).

    Raises ValueError when a file is not what was cut.
    """
    parts: dict[str, dict[int, Path]] = defaultdict(dict)
    counts = {}
    for path in carried(folder, "*.part-*"):
        if found := _PART.fullmatch(path.name):
            parts[found[1]][int(found[2])] = path
            counts[found[1]] = int(found[3])
    joined, lacking = [], []
    for name, by_number in parts.items():
        if missing := [str(n) for n in range(1, counts[name] + 1) if n not in by_number]:
            lacking.append(f"{name}: no part {', '.join(missing)} of {counts[name]}")
            continue
        joined.append(_joined(into / name, [by_number[n] for n in sorted(by_number)]))
    return joined, lacking


def _joined(target: Path, parts: list[Path]) -> Path:
    wanted = parts[0].with_name(f"{target.name}.sha256").read_text().strip()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as whole:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, whole, _BLOCK)
    if checksum(target) != wanted:
        target.unlink()
        raise ValueError(f"{target.name}: the parts do not give the file that was cut; carry them again")
    return target


def checksum(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
