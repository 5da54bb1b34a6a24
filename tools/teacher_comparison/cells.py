"""The cells of the comparison: what each trains with, and the lines of JSON that they leave."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = ("gsm8k", "instructions")
TEACHERS = ("original", "specialist")


@dataclass(frozen=True, slots=True)
class Cell:
    """A model that is measured."""

    name: str
    label: str
    settings: tuple[str, ...] | None = None
    """Overrides of two_teachers.yaml that train it; None: a model that is there."""


def _routed(teacher: int, *sources: str) -> str:
    weights = ", ".join(f"{source}: {int(source in sources)}" for source in SOURCES)
    return f"teachers.{teacher}.sources={{{weights}}}"


CELLS = (
    Cell("before", "student before"),
    Cell("original", "original itself"),
    Cell("specialist", "specialist itself"),
    Cell("only_original", "original alone", (_routed(0, *SOURCES), _routed(1))),
    Cell("routed", "routed by source", (_routed(0, "gsm8k"), _routed(1, "instructions"))),
    Cell("logits", "averaged by logits", ("loss.ensemble=logits",)),
    Cell("probs", "averaged by probabilities", ("loss.ensemble=probs",)),
    Cell("only_specialist", "specialist alone", (_routed(0), _routed(1, *SOURCES))),
)


def read(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The finished cells of these settings, by name; a line that was cut off is none."""
    found: dict[str, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["settings"] == settings:
            found[line["cell"]] = line
    return found


def add(path: Path, line: Mapping[str, Any]) -> None:
    """A cell is finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.is_file() else b""
    cut_off = "" if before.endswith(b"\n") or not before else "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{cut_off}{json.dumps(line)}\n")


def known(names: Sequence[str]) -> list[Cell]:
    """Cells by their names, in the order of the tables."""
    return [cell for cell in CELLS if cell.name in names]
