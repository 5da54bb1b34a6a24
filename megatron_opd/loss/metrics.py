"""Metrics by name: per-token values while a loss is computed, sums while micro-batches are, means at the end.

A term declares its names (`metric_names`), which follow from its settings alone, so every rank has the same ones
whatever tokens it has. Only `rows` turns names into rows of a tensor, because ranks add up tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch

Columns: TypeAlias = Mapping[str, torch.Tensor]
"""By name, a metric's value at each token that has one."""
Sums: TypeAlias = dict[str, torch.Tensor]
"""By name, [2] float64: the sum over tokens, and their number."""


def sums(columns: Columns) -> Sums:
    """Of the values of some tokens."""
    return {
        name: torch.stack([x.detach().double().sum(), x.new_tensor(len(x)).double()]) for name, x in columns.items()
    }


def added(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> Sums:
    """Of the tokens of both."""
    both = {name: one[name] + other[name] for name in one if name in other}
    return {**one, **other, **both}


def rows(names: Sequence[str], found: Iterable[Sums], device: torch.device) -> torch.Tensor:
    """The totals as a tensor [M, 2] float64 in the order of `names`, 0 where there is nothing. Raises ValueError for a
    name that was not declared: other ranks would not know it."""
    at = {name: row for row, name in enumerate(names)}
    total_M2 = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for its in found:
        unknown = [name for name in its if name not in at]
        if unknown:
            raise ValueError(
                f"metrics {', '.join(unknown)} are not among metric_names() of the term that computes them"
            )
        for name, sum_and_count in its.items():
            total_M2[at[name]] += sum_and_count
    return total_M2


def means(names: Sequence[str], total_M2: torch.Tensor) -> dict[str, float]:
    """Of those that have tokens."""
    return {name: total / count for name, (total, count) in zip(names, total_M2.tolist(), strict=True) if count}
