"""The updates of one step: a pass over the parts of its answers, or several, an optimizer step for each part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean

from megatron_opd.config import TrainConfig
from megatron_opd.core.types import MicroBatch
from megatron_opd.loss.objective import Objective
from megatron_opd.student.student import Student

AFTER = "after/"
"""Begins the names of what is measured after the updates."""


def split(batches: Sequence[MicroBatch], count: int) -> list[list[MicroBatch]]:
    """The micro-batches of each of `count` updates of one pass over the answers, in order, as equal as they can be."""
    ends = [len(batches) * i // count for i in range(count + 1)]
    return [list(batches[start:end]) for start, end in pairwise(ends)]


def update(
    student: Student,
    parts: Sequence[Sequence[MicroBatch]],
    objective: Objective,
    train: TrainConfig,
    *,
    told: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Train on `parts`, `train.epochs` times; metrics of the last pass, with `measure_after` also of the new weights.

    `told` is called when a micro-batch begins.
    Raises FloatingPointError as `Student.step`.
    """
    passes = [[student.step(part, objective, told=told) for part in parts] for _ in range(train.epochs)]
    metrics = joined(passes[-1])
    if train.measure_after:
        batches = [batch for part in parts for batch in part]
        after = student.evaluate(batches, objective)
        metrics |= {f"{AFTER}{name}": x for name, x in after.items() if name.startswith(("kl/", "mismatch/"))}
    return metrics


def joined(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of several updates on different answers: means weighted by their tokens, of tokens the sum, of `lr` and
    `loss_scale` the last."""
    if len(metrics) == 1:
        return metrics[0]
    names = {name: None for its in metrics for name in its}  # in order
    weighted = {name: [(its[name], its["num_tokens"]) for its in metrics if name in its] for name in names}
    found = {name: sum(x * n for x, n in pairs) / sum(n for _, n in pairs) for name, pairs in weighted.items()}
    found["num_tokens"] = sum(its["num_tokens"] for its in metrics)
    found |= {name: metrics[-1][name] for name in ("lr", "loss_scale") if name in metrics[-1]}
    norms = [its["grad_norm"] for its in metrics if "grad_norm" in its]  # a skipped update may have none
    return {**found, "grad_norm": fmean(norms)} if norms else found
