"""The cells, method x seed: in which order they are run, and which learning rate each method is judged by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_cells.methods import FIRST, THEN, Method

TUNING_SEED = 0
UNKNOWN_LR = 0.0
"""The learning rate of a cell whose method is not tuned yet."""

Lines = Mapping[str, Mapping[str, Any]]
"""Finished cells by name."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run."""

    method: Method
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Name in the lines of JSON."""
        lr = f"{self.lr:g}" if self.lr != UNKNOWN_LR else "?"
        return f"{self.method.name}/lr{lr}/seed{self.seed}"


def in_order(methods: Sequence[Method], seeds: Sequence[int], lines: Lines) -> list[Cell]:
    """All cells. Those of the first methods come first, and for either part the learning rates, then seed by seed."""
    cells: list[Cell] = []
    for part in (FIRST, THEN):
        its = [method for method in part if method in methods]
        cells += [cell for method in its for cell in tuning(method)]
        cells += [Cell(method, best(method, lines), seed) for seed in seeds for method in its]
    return cells


def tuning(method: Method) -> list[Cell]:
    """A cell for each learning rate, on a seed of their own."""
    return [Cell(method, lr, TUNING_SEED) for lr in method.lrs]


def best(method: Method, lines: Lines) -> float:
    """The learning rate that recovers most at the end; UNKNOWN_LR while some are still to be tried."""
    tried = {cell.lr: lines[cell.name] for cell in tuning(method) if cell.name in lines}
    return max(tried, key=lambda lr: recovered(tried[lr])[-1]) if len(tried) == len(method.lrs) else UNKNOWN_LR


def recovered(line: Mapping[str, Any]) -> list[float]:
    """The part of what was lost that is back, at each evaluation: of top-1 agreement on the teacher's answers."""
    found = [point["forced_agreement"] for point in line["points"]]
    return [(after - found[0]) / (1 - found[0]) for after in found]


def of_method(method: Method, seeds: Sequence[int], lines: Lines) -> Iterator[Mapping[str, Any]]:
    """Its finished cells on these seeds, at the learning rate that it is judged by."""
    for seed in seeds:
        name = Cell(method, best(method, lines), seed).name
        if name in lines:
            yield lines[name]
