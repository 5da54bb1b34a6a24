"""The list of checks, read from a TOML file (`checks.toml` says what its entries mean)."""

from __future__ import annotations

import fnmatch
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = ("plain", "te", "servers")
FIGURES = ("last-line", "pytest", "bench", "run")
PAGE = Path(__file__).with_name("checks.toml")


@dataclass(frozen=True)
class Check:
    """One line of the table and the command behind it."""

    name: str
    what: str
    stage: str
    command: tuple[str, ...]
    """Arguments of the interpreter."""
    figure: str
    limit_s: float = float("inf")
    required: bool = False
    """Whether all that follow are pointless when it fails."""

    def arguments(self, run_dir: Path) -> list[str]:
        """The command with its folder filled in."""
        return [part.replace("{run}", str(run_dir)) for part in self.command]


def read(page: Path) -> list[Check]:
    """All checks of the file, in order. Raises ValueError when it is not a list of checks."""
    try:
        found = tomllib.loads(page.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{page}: not TOML: {error}") from None
    checks = [_check(page, row, found.get("lists", {})) for row in found.get("check", [])]
    if not checks:
        raise ValueError(f"{page}: no [[check]] in it")
    names = [check.name for check in checks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{page}: names that are there twice: {', '.join(sorted(twice))}")
    return checks


def chosen(checks: list[Check], *, stages: list[str], patterns: list[str]) -> list[Check]:
    """The checks of these stages with a name like one of the patterns (all without any), and those that are required.
    Raises ValueError when a pattern fits none."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(check.name, pattern) for check in checks):
            names = ", ".join(check.name for check in checks)
            raise ValueError(f"there is no check like {pattern!r}; they are: {names}")
    return [
        check
        for check in checks
        if check.required
        or (check.stage in stages and (not patterns or any(fnmatch.fnmatchcase(check.name, p) for p in patterns)))
    ]


def _check(page: Path, row: dict[str, Any], lists: dict[str, list[str]]) -> Check:
    """Raises ValueError with the entry that is wrong."""
    try:
        made = Check(**{**row, "command": tuple(_expanded(row["command"], lists))})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{page}: the check {row.get('name', row)!r}: {error}") from None
    for value, allowed in ((made.stage, STAGES), (made.figure, FIGURES)):
        if value not in allowed:
            raise ValueError(f"{page}: the check {made.name!r}: {value!r} is none of {', '.join(allowed)}")
    return made


def _expanded(command: list[str], lists: dict[str, list[str]]) -> list[str]:
    parts = []
    for part in command:
        parts += lists[part[1:]] if part.startswith("$") else [part]
    return parts
