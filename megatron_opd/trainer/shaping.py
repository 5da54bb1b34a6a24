"""From the scored micro-batches of a step to what is trained on: parts for its updates, weights, and advantages.

Everything that concerns more than one micro-batch happens here, before the first forward pass: which answers belong to
one prompt, means and deviations over the step, and shares in means that count answers. Sums over replicas make these
the same numbers in every layout. With the defaults micro-batches stay as they are.

Shape suffixes: T tokens of a micro-batch, R rollouts of this replica, N teachers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_opd.config import Config
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.types import MicroBatch, Rollout
from megatron_opd.loss.distillation import Distillation
from megatron_opd.trainer import advantages
from megatron_opd.trainer.shaping_metrics import Totals, count_rewards


@dataclass(frozen=True, slots=True)
class _Shaped:
    """What is said about the rollouts before shares: R factors of the distillation, R advantages of rewards."""

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
        self, rollouts: Sequence[Rollout], batches: Sequence[MicroBatch], step: int
    ) -> tuple[list[list[MicroBatch]], dict[str, float]]:
        """(the micro-batches of each update of one pass over the answers, metrics). Collective.

        `batches` hold `rollouts` in order; `step` counts from 0.
        """
        size = len(batches) // self.config.train.minibatches
        parts = [list(batches[i : i + size]) for i in range(0, len(batches), size)]
        if not self._is_needed(step):
            return parts, {}
        shaped = self._of_rollouts(rollouts, step)
        totals = Totals(self.config.policy, self.config.rl, self.config.data.train)
        count_rewards(totals, rollouts)
        counts = self._counts(parts)
        if self.parallel.is_last_stage:
            taught = self._from_teachers(batches, totals)
            i, at = 0, 0
            for part, (tokens, answers) in zip(parts, counts, strict=True):
                for j, batch in enumerate(part):
                    its = slice(at, at + len(batch.tokens_BS))
                    lengths_R = [len(r.response_ids) for r in rollouts[its]]
                    how = _Share(lengths_R, tokens, answers)
                    part[j] = self._weighted(batch, _of(shaped, its), taught[i], how, totals)
                    i, at = i + 1, its.stop
        return parts, totals.means(self.parallel)

    def _is_needed(self, step: int) -> bool:
        config, loss = self.config, self.config.loss
        return (
            config.has_policy_gradient
            or config.is_graded
            or loss.aggregation != "token-mean"
            or self._weight(step) not in (0.0, 1.0)
            or loss.anneal > 0
        )

    def _weight(self, step: int) -> float:
        loss = self.config.loss
        return advantages.annealed(loss.weight, by=loss.anneal, least=loss.weight_min, step=step)

    def _of_rollouts(self, rollouts: Sequence[Rollout], step: int) -> _Shaped:
        """Only the student's own, graded answers are compared with each other; others get no advantage, no mask."""
        distill_R, rewarded_R = [self._weight(step)] * len(rollouts), [0.0] * len(rollouts)
        graded = [i for i, r in enumerate(rollouts) if r.origin == "student" and r.reward is not None]
        if graded:
            rewards = [rollouts[i].reward or 0.0 for i in graded]
            groups = [rollouts[i].prompt.group for i in graded]
            found = advantages.from_rewards(rewards, groups, self.config.rl)
            keeps = advantages.distills(rewards, groups, self.config.rl)
            for i, advantage, keep in zip(graded, found, keeps, strict=True):
                rewarded_R[i] = self.config.rl.weight * advantage
                distill_R[i] *= keep
        return _Shaped(distill_R, rewarded_R)

    def _counts(self, parts: Sequence[Sequence[MicroBatch]]) -> list[tuple[int, int]]:
        """(tokens, answers) of every part, over all replicas."""
        device = parts[0][0].targets_T.device
        mine = [[sum(len(b.targets_T) for b in part), sum(len(b.tokens_BS) for b in part)] for part in parts]
        counts = torch.tensor(mine, device=device)
        dist.all_reduce(counts, group=self.parallel.data_group)
        return [(tokens, answers) for tokens, answers in counts.tolist()]

    def _from_teachers(self, batches: Sequence[MicroBatch], totals: Totals) -> list[torch.Tensor | None]:
        """The teachers' advantage of every token by micro-batch, float64, 0 where none was asked; None: not wanted."""
        how = self.config.policy
        if not how.kl_coef:
            return [None] * len(batches)
        found, counted = [], []
        for batch in batches:
            logp_T = self.distillation.teachers_logp(batch)
            counted.append(_on_policy(batch) & (batch.weights_TN > 0).any(-1))
            logp_T = torch.where(counted[-1], logp_T, batch.behaviour_logp_T)
            found.append(advantages.from_teachers(logp_T, batch.behaviour_logp_T, _answers(batch), how))
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
        device = batch.targets_T.device
        loss_T = share.of(self.config.loss.aggregation, device)
        distill_T = loss_T * share.spread(shaped.distill_R, device)
        before_T = batch.distill_T
        changes = {
            "distill_T": (distill_T if before_T is None else before_T * distill_T).float(),
            "sft_T": None if batch.sft_T is None else (batch.sft_T * loss_T).float(),
        }
        if self.config.has_policy_gradient:
            advantage_T = share.spread(shaped.rewarded_R, device) * _on_policy(batch)
            advantage_T = advantage_T if taught_T is None else advantage_T + taught_T
            totals.add_advantages(advantage_T[_on_policy(batch)])
            changes["advantage_T"] = (advantage_T * share.of(self.config.policy.aggregation, device)).float()
        return replace(batch, **changes)


@dataclass(frozen=True, slots=True)
class _Share:
    """The answers of a micro-batch among those of an update."""

    lengths_R: list[int]
    tokens: int
    """Of the update, over all replicas; as are `answers`."""
    answers: int

    def of(self, how: str, device: torch.device) -> torch.Tensor:
        """The factor of each token for an aggregation, [T] float64."""
        return self.spread(advantages.shares(self.lengths_R, how=how, tokens=self.tokens, answers=self.answers), device)

    def spread(self, values_R: Sequence[float], device: torch.device) -> torch.Tensor:
        """From rollouts to their tokens."""
        lengths = torch.tensor(self.lengths_R, device=device)
        return torch.tensor(values_R, dtype=torch.float64, device=device).repeat_interleave(lengths)


def _of(shaped: _Shaped, its: slice) -> _Shaped:
    return _Shaped(shaped.distill_R[its], shaped.rewarded_R[its])


def _on_policy(batch: MicroBatch) -> torch.Tensor:
    return torch.ones_like(batch.targets_T, dtype=torch.bool) if batch.on_policy_T is None else batch.on_policy_T


def _answers(batch: MicroBatch) -> torch.Tensor:
    """The number of each token's answer in the micro-batch, [T]."""
    return batch.rows_T // batch.tokens_BS.shape[1]
