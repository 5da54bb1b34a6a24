"""What a step's metrics are made of besides the objective's: rollouts, servers, and what follows from other metrics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from megatron_opd.parallel import Parallel
from megatron_opd.types import Rollout, RolloutEngine, TeacherScorer


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


def of_rollouts(rollouts: Sequence[Rollout], parallel: Parallel, *, version: int) -> dict[str, float]:
    """Means over the rollouts of all replicas, which have equally many. Collective."""
    mine = {
        "rollout/length": fmean(len(r.response_ids) for r in rollouts),
        "rollout/truncated_frac": fmean(r.finish == "length" for r in rollouts),
        "rollout/version_lag": fmean(version - v for r in rollouts for v in r.versions),
    }
    replicas = parallel.gather_leaders(mine)
    return {name: fmean(replica[name] for replica in replicas) for name in mine}


def of_parts(parts: Sequence[RolloutEngine | TeacherScorer | None], parallel: Parallel) -> dict[str, float]:
    """What engine and teachers counted on the leaders of all replicas since the last step. Collective."""
    totals: Counter[str] = Counter()
    mine = [part.metrics() for part in parts if part is not None]
    for replica in parallel.gather_leaders(mine):
        for counted in replica:
            totals.update(counted)
    return dict(totals)
