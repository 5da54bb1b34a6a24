"""Means over the tokens and answers of a step, on all replicas, of what decides about them: rewards and advantages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_opd.config import PolicyConfig, RLConfig, SourceConfig
from megatron_opd.config.policy import has_policy_gradient
from megatron_opd.core.episodes import episodes
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.types import Rollout
from megatron_opd.trainer.advantages import members_by_group


class Totals:
    """Sums and counts by name; every rank has the same names."""

    def __init__(
        self, policy: PolicyConfig, rl: RLConfig, sources: Sequence[SourceConfig], *, has_rewards: bool = True
    ) -> None:
        names = [f"reward/{source.name}" for source in sources]
        names = ["reward/mean", *names, "reward/mixed_groups"] if has_rewards else []
        if has_policy_gradient(policy, rl):
            names += ["advantage/mean", "advantage/square"]
        if policy.kl_coef:
            names += ["distill/advantage", "distill/prob_ratio"]
        self._sums = {name: [0.0, 0.0] for name in names}

    def add(self, name: str, values: Sequence[float] | torch.Tensor) -> None:
        """Count some values to the mean `name`."""
        total = values.double().sum().item() if isinstance(values, torch.Tensor) else math.fsum(values)
        self._sums[name][0] += total
        self._sums[name][1] += len(values)

    def add_teachers(self, lead_T: torch.Tensor) -> None:
        """log p(y) - log mu(y) of tokens."""
        self.add("distill/advantage", lead_T)
        self.add("distill/prob_ratio", lead_T.double().exp())

    def add_advantages(self, advantage_T: torch.Tensor) -> None:
        """Whole advantages, without shares in means."""
        self.add("advantage/mean", advantage_T)
        self.add("advantage/square", advantage_T.double() ** 2)

    def means(self, parallel: Parallel) -> dict[str, float]:
        """Over all replicas, on every rank; without what has no values. Collective."""
        mine = float(parallel.counts_whole)
        sums_M2 = torch.tensor(list(self._sums.values()), dtype=torch.float64).reshape(-1, 2) * mine
        dist.all_reduce(sums_M2, group=parallel.world_group)
        pairs = zip(self._sums, sums_M2.tolist(), strict=True)
        found = {name: total / count for name, (total, count) in pairs if count}
        if "advantage/square" in found:
            square = found.pop("advantage/square")
            found["advantage/std"] = math.sqrt(max(square - found["advantage/mean"] ** 2, 0.0))
        if "distill/advantage" in found:
            found["distill/reverse_kl"] = -found["distill/advantage"]
        return found


def of_rewards(rollouts: Sequence[Rollout], sources: Sequence[SourceConfig], parallel: Parallel) -> dict[str, float]:
    """The rewards of a step alone, where nothing is shaped. Collective."""
    totals = Totals(PolicyConfig(), RLConfig(), sources)
    count_rewards(totals, rollouts)
    return totals.means(parallel)


def count_rewards(totals: Totals, rollouts: Sequence[Rollout]) -> None:
    """Rewards of the student's episodes, by source, and how many prompts have episodes of different rewards."""
    first = [rollouts[its[0]] for its in episodes(rollouts)]
    graded = [r for r in first if r.reward is not None and r.origin == "student"]
    for rollout in graded:
        totals.add("reward/mean", [rollout.reward or 0.0])
        totals.add(f"reward/{rollout.prompt.source}", [rollout.reward or 0.0])
    groups = members_by_group([r.prompt.group for r in graded])
    if groups:
        totals.add("reward/mixed_groups", [len({graded[i].reward for i in group}) > 1 for group in groups])
