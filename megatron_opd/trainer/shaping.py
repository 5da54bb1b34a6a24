"""From the scored micro-batches of a step to what is trained on: weights and advantages by token.

Everything that concerns more than one micro-batch happens here, before the first forward pass: which episodes belong to
one prompt, means and deviations over the step, and shares in means that count episodes. Sums over replicas make these
the same numbers in every layout. With the defaults there is no shaping (`is_shaped`).

Shape suffixes: T tokens of a micro-batch, R rollouts of this replica, N teachers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_opd.config import Config, LossConfig, PolicyConfig, RLConfig
from megatron_opd.config.policy import has_policy_gradient
from megatron_opd.core.episodes import episodes
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.types import MicroBatch, Rollout
from megatron_opd.loss.distillation import Distillation
from megatron_opd.trainer import advantages
from megatron_opd.trainer.shaping_metrics import Totals, count_rewards


def is_shaped(loss: LossConfig, policy: PolicyConfig, rl: RLConfig) -> bool:
    """Whether the settings give tokens other weights or advantages than the micro-batches have."""
    is_weighted = loss.weight not in (0.0, 1.0) or loss.anneal > 0 or loss.aggregation != "token-mean"
    return is_weighted or has_policy_gradient(policy, rl) or rl.needs_rewards


@dataclass(frozen=True, slots=True)
class _Shaped:
    """Numbers of the rollouts before shares: R factors of the distillation, R advantages of rewards."""

    distill_R: list[float]
    rewarded_R: list[float]


@dataclass(frozen=True, slots=True)
class Shaping:
    """The settings of weights and advantages, on this rank."""

    config: Config
    parallel: Parallel
    distillation: Distillation
    """For what teachers that tell hidden states have to say about sampled tokens."""

    def __call__(
        self, rollouts: Sequence[Rollout], parts: Sequence[Sequence[MicroBatch]], step: int
    ) -> tuple[list[list[MicroBatch]], dict[str, float]]:
        """(`parts` with weights and advantages, metrics). Collective.

        `parts` are the micro-batches of each update, which hold `rollouts` in order; `step` counts from 0.
        """
        parts = [list(part) for part in parts]
        shaped = self._of_rollouts(rollouts, step)
        config = self.config
        totals = Totals(config.policy, config.rl, config.data.train, has_rewards=config.has_rewards)
        count_rewards(totals, rollouts)
        lengths_R, counts = self._episodes(rollouts, parts)
        if self.parallel.is_last_stage:
            taught = iter(self._from_teachers([batch for part in parts for batch in part], totals))
            at = 0
            for part, count in zip(parts, counts, strict=True):
                for j, batch in enumerate(part):
                    its = slice(at, at + len(batch.tokens_BS))
                    share = _Share(batch.sequence_T, lengths_R[its], *count)
                    part[j] = self._weighted(batch, _of(shaped, its), next(taught), share, totals)
                    at = its.stop
        return parts, totals.means(self.parallel)

    def _weight(self, step: int) -> float:
        loss = self.config.loss
        return advantages.annealed(loss.weight, by=loss.anneal, least=loss.weight_min, step=step)

    def _of_rollouts(self, rollouts: Sequence[Rollout], step: int) -> _Shaped:
        """Only the student's own, graded episodes are compared with each other; others get no advantage, no mask."""
        distill_R, rewarded_R = [self._weight(step)] * len(rollouts), [0.0] * len(rollouts)
        graded = [its for its in episodes(rollouts) if _is_graded(rollouts[its[0]])]
        if graded and self.config.is_graded:  # else they are only watched
            rewards = [rollouts[its[0]].reward or 0.0 for its in graded]
            groups = [rollouts[its[0]].prompt.group for its in graded]
            found = advantages.from_rewards(rewards, groups, self.config.rl)
            keeps = advantages.distills(rewards, groups, self.config.rl)
            for its, advantage, keep in zip(graded, found, keeps, strict=True):
                for i in its:
                    rewarded_R[i] = self.config.rl.weight * advantage
                    distill_R[i] *= keep
        return _Shaped(distill_R, rewarded_R)

    def _episodes(
        self, rollouts: Sequence[Rollout], parts: Sequence[Sequence[MicroBatch]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """(the learnt tokens of each rollout's episode [R]; of every part the (tokens, episodes) over all replicas).

        An episode whose trajectories lie in two parts counts in both, in each with the tokens that it has there.
        """
        lengths_R: list[int] = []
        mine, at = [], 0
        for part in parts:
            here = rollouts[at : at + sum(len(batch.tokens_BS) for batch in part)]
            at += len(here)
            found = episodes(here)
            for its in found:
                lengths_R += [sum(here[i].num_learnt for i in its)] * len(its)
            mine.append([sum(r.num_learnt for r in here), len(found)])
        counts = torch.tensor(mine, device=parts[0][0].targets_T.device)
        dist.all_reduce(counts, group=self.parallel.data_group)
        return lengths_R, [(tokens, count) for tokens, count in counts.tolist()]

    def _from_teachers(self, batches: Sequence[MicroBatch], totals: Totals) -> list[torch.Tensor | None]:
        """The teachers' advantage of every token by micro-batch, float64, 0 where none was asked; None: not wanted."""
        how = self.config.policy
        if not how.kl_coef:
            return [None] * len(batches)
        found, counted = [], []
        for batch in batches:
            logp_T = self.distillation.teachers_logp(batch)
            counted.append(batch.on_policy_T & (batch.weights_TN > 0).any(-1))
            logp_T = torch.where(counted[-1], logp_T, batch.behaviour_logp_T)
            found.append(advantages.from_teachers(logp_T, batch.behaviour_logp_T, batch.sequence_T, how))
            totals.add_teachers((logp_T - batch.behaviour_logp_T)[counted[-1]])
        if how.kl_whiten:
            mean, deviation = self._moments([x_T[own_T] for x_T, own_T in zip(found, counted, strict=True)])
            found = [(x_T - mean) / deviation for x_T in found]
        return [how.kl_coef * x_T * own_T for x_T, own_T in zip(found, counted, strict=True)]

    def _moments(self, values: Sequence[torch.Tensor]) -> tuple[float, float]:
        """Mean and standard deviation over all replicas; a deviation of 0 counts as 1."""
        x = torch.cat(list(values)).double()
        sums = torch.stack([x.new_tensor(float(len(x))), x.sum()])
        dist.all_reduce(sums, group=self.parallel.data_group)
        count, total = sums.tolist()
        mean = total / max(count, 1)
        squares = ((x - mean) ** 2).sum()
        dist.all_reduce(squares, group=self.parallel.data_group)
        return mean, math.sqrt(squares.item() / max(count, 1)) or 1.0

    def _weighted(
        self, batch: MicroBatch, shaped: _Shaped, taught_T: torch.Tensor | None, share: _Share, totals: Totals
    ) -> MicroBatch:
        """The micro-batch with its weights and advantages."""
        loss_T = share.of(self.config.loss.aggregation)
        distill_T = loss_T * share.spread(shaped.distill_R)
        weights = {term: (weight_T * loss_T).float() for term, weight_T in batch.weights_T.items()}
        weights["distill"] = (batch.weight("distill") * distill_T).float()
        if self.config.has_policy_gradient:
            advantage_T = share.spread(shaped.rewarded_R) * batch.on_policy_T
            advantage_T = advantage_T if taught_T is None else advantage_T + taught_T
            totals.add_advantages(advantage_T[batch.on_policy_T])
            weights["policy"] = (advantage_T * share.of(self.config.policy.aggregation)).float()
        return batch.weighing(**weights)


@dataclass(frozen=True, slots=True)
class _Share:
    """The rollouts of a micro-batch among those of an update."""

    sequence_T: torch.Tensor
    """Number of each token's rollout, of R."""
    lengths_R: list[int]
    """Learnt tokens of the rollouts' episodes."""
    tokens: int
    """Learnt tokens of the update, over all replicas; as are `episodes`."""
    episodes: int

    def of(self, how: str) -> torch.Tensor:
        """The factor of each token for an aggregation, [T] float64."""
        return self.spread(advantages.shares(self.lengths_R, how=how, tokens=self.tokens, episodes=self.episodes))

    def spread(self, values_R: Sequence[float]) -> torch.Tensor:
        """From rollouts to their tokens, [T] float64."""
        return torch.tensor(values_R, dtype=torch.float64, device=self.sequence_T.device)[self.sequence_T]


def _is_graded(rollout: Rollout) -> bool:
    return rollout.origin == "student" and rollout.reward is not None


def _of(shaped: _Shaped, its: slice) -> _Shaped:
    return _Shaped(shaped.distill_R[its], shaped.rewarded_R[its])
