"""The cells of the comparison: what each trains with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def known(names: Sequence[str]) -> list[Cell]:
    """Cells by their names, in the order of the tables."""
    return [cell for cell in CELLS if cell.name in names]
