"""Metrics by name: per-token values while a loss is computed, sums while micro-batches are, means at the end.

A term declares its names (`metric_names`), which follow from its settings alone, so every rank has the same ones
whatever tokens it has. Only `rows` turns names into rows of a tensor, because ranks add up tensors. `Compared` is what
every kind of distillation knows about each token, and `comparison` its metrics.

Shape suffixes: T learnt tokens of a micro-batch, C some of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from megatron_opd.core.scores import TokenRows
from megatron_opd.core.types import MicroBatch

Columns: TypeAlias = Mapping[str, torch.Tensor]
"""By name, a metric's value at each token that has one."""
Sums: TypeAlias = dict[str, torch.Tensor]
"""By name, [2] float64: the sum over tokens, and their number."""


def sums(columns: Columns) -> Sums:
    """The sums of some tokens' values."""
    return {
        name: torch.stack([x.detach().double().sum(), x.new_tensor(len(x)).double()]) for name, x in columns.items()
    }


def added(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> Sums:
    """The sums over the tokens of both."""
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
    """The means of the metrics that have tokens."""
    return {name: total / count for name, (total, count) in zip(names, total_M2.tolist(), strict=True) if count}


@dataclass(frozen=True, slots=True)
class Compared:
    """Student and teachers at some tokens of a micro-batch, without gradients."""

    loss_C: torch.Tensor
    """With the weights of the distillation."""
    reverse_kl_C: torch.Tensor
    """KL(student || target)."""
    by_teacher: Sequence[torch.Tensor]
    """KL(student || teacher) at the tokens that each teacher was asked about."""
    student_C: torch.Tensor
    """Log-probabilities of the sampled tokens: the student's, the target's, the student's at the sampler's
    temperature."""
    target_C: torch.Tensor
    sampler_C: torch.Tensor


def comparison_names(teachers: Sequence[str]) -> list[str]:
    """Names of `comparison`, in the order of tables."""
    kls = [f"kl/{name}" for name in teachers]
    return ["loss", "kl/ensemble", *kls, "logprob/student", "logprob/teacher", "mismatch/kl"]


def comparison(found: Compared, teachers: Sequence[str], batch: MicroBatch, rows: TokenRows = slice(None)) -> Columns:
    """The metrics of the tokens `rows`."""
    return {
        "loss": found.loss_C,
        "kl/ensemble": found.reverse_kl_C,
        **{f"kl/{name}": kl_C for name, kl_C in zip(teachers, found.by_teacher, strict=True)},
        "logprob/student": found.student_C,
        "logprob/teacher": found.target_C,
        "mismatch/kl": mismatch(found.sampler_C, batch, rows),
    }


def mismatch(sampler_C: torch.Tensor, batch: MicroBatch, rows: TokenRows = slice(None)) -> torch.Tensor:
    """k3 estimate of KL(sampler || trainer) on the student's own tokens (Schulman): never negative, 0 when the two
    agree. `sampler_C`: the student's log-probabilities at the sampler's temperature."""
    lag_C = (sampler_C - batch.behaviour_logp_T[rows])[batch.on_policy_T[rows]]
    return torch.expm1(lag_C) - lag_C  # e^l - 1 - l would lose all bits near 0, and its sign
