"""Metrics of a step besides the objective's: of rollouts, micro-batches, servers and memory, and those that follow from
other metrics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from megatron_opd.config import RLConfig
from megatron_opd.core import process_memory
from megatron_opd.core.episodes import episodes
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.protocols import Part
from megatron_opd.core.types import MicroBatch, Rollout
from megatron_opd.tracking.headline import Headline

_FEW = 4


def derived(metrics: dict[str, float]) -> dict[str, float]:
    """The step's metrics with what follows from them."""
    named = {name: value for name, value in metrics.items() if name != "num_tokens"}
    if not {"logprob/student", "logprob/teacher"} <= metrics.keys():  # no teacher was asked, or the step was skipped
        return named
    student, teacher = metrics["logprob/student"], metrics["logprob/teacher"]
    return {
        **named,
        "logprob/gap": student - teacher,
        "perplexity/student": math.exp(-student),
        "perplexity/teacher": math.exp(min(-teacher, 700.0)),  # a teacher may rule a sampled token out
    }


def of_rollouts(
    rollouts: Sequence[Rollout], parallel: Parallel, *, version: int, is_mixed: bool = False
) -> dict[str, float]:
    """Means over the student's own episodes of all replicas; with `is_mixed` also how many those are, and how long the
    others. Lengths are in learnt tokens. Collective."""
    every = [[rollouts[i] for i in its] for its in episodes(rollouts)]
    own = [episode for episode in every if episode[0].origin == "student"]
    others = [episode for episode in every if episode[0].origin != "student"]
    mine = {
        "rollout/length": [_length(episode) for episode in own],
        "rollout/truncated_frac": [float(episode[-1].finish == "length") for episode in own],
        "rollout/version_lag": [float(version - v) for episode in own for r in episode for v in r.versions],
    }
    said = Counter(hash(tuple(r.token_ids for r in episode)) for episode in own)
    if is_mixed:
        mine["answers/student_frac"] = [float(episode[0].origin == "student") for episode in every]
        mine["answers/length_others"] = [_length(episode) for episode in others]
    sums = {name: (math.fsum(values), len(values)) for name, values in mine.items()}
    replicas, everything_said = zip(*parallel.gather_leaders((sums, said)), strict=True)
    totals = {name: [sum(column) for column in zip(*(r[name] for r in replicas), strict=True)] for name in mine}
    found = {name: total / count for name, (total, count) in totals.items() if count}
    return {**found, **_most_common(sum(everything_said, Counter()))}


def _most_common(said: Counter[int]) -> dict[str, float]:
    """The share of answers that are the most frequent one; nothing of so few that they may be alike by chance."""
    count = said.total()
    return {"rollout/most_common_frac": max(said.values()) / count} if count >= _FEW else {}


def headlines(rl: RLConfig) -> list[Headline]:
    """The metrics of answers that people are to see at every step."""
    mixed = [Headline("reward/mixed_groups", "mixed groups", "{:.3g}")] if rl.weight > 0 else []
    return [Headline("reward/mean", "reward", "{:.3f}"), *mixed, Headline("rollout/length", "length", "{:.1f}")]


def _length(episode: Sequence[Rollout]) -> float:
    return float(sum(r.num_learnt for r in episode))


def of_batches(batches: Sequence[MicroBatch], parallel: Parallel) -> dict[str, float]:
    """The share of padding in what goes through the student, over all replicas. Collective."""
    mine = sum(sum(batch.lengths) for batch in batches), sum(math.prod(batch.model_shape) for batch in batches)
    real, seen = (sum(column) for column in zip(*parallel.gather_leaders(mine), strict=True))
    return {"batch/padding": 1 - real / seen} if seen else {}


def of_parts(parts: Sequence[Part], parallel: Parallel) -> dict[str, float]:
    """Counts of engines and teachers since the last step, over the leaders of all replicas. Collective."""
    totals: Counter[str] = Counter()
    mine = [part.metrics() for part in parts]
    for replica in parallel.gather_leaders(mine):
        for counted in replica:
            totals.update(counted)
    return dict(totals)


def of_memory(parallel: Parallel) -> dict[str, float]:
    """Gigabytes of the rank that has most: of host memory now, and of a GPU's, where there is one, at the worst moment
    since the last call. Collective."""
    mine = {"memory/rss": process_memory.resident()}
    if torch.cuda.is_available():
        mine["memory/gpu"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    everyone = parallel.gather_world(mine)
    return {name: max(one[name] for one in everyone) / 1e9 for name in mine}
