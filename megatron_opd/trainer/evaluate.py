"""How good answers to held-out prompts are: by the reward of their source, greedy and as samples.

Everything is a mean over prompts of a number in [0, 1], so that replicas add up, and so that one interval does for
all of them: Wilson's score interval (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927). For means of right and wrong it is
the usual one; for means of other numbers in [0, 1] it is too wide, never too narrow, because their variance is at
most p(1 - p).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from megatron_opd.config import DataConfig, RewardsConfig, RolloutConfig, RunConfig
from megatron_opd.core.episodes import episodes
from megatron_opd.core.protocols import OnFinished, RolloutEngine
from megatron_opd.core.types import Prompt, Rollout
from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.rewards.grading import Grader
from megatron_opd.rollout import sampling
from megatron_opd.rollout.worlds import World

Tally = Mapping[tuple[str, str], tuple[float, int]]
"""By (measure, source): the sum over prompts, and how many they are."""
ALL = "all"
NOWHERE: Mapping[str, World] = {}
"""No source has an environment."""
_Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


class Evaluator:
    """Asks an engine, grades what it says."""

    def __init__(
        self,
        data: DataConfig,
        rewards: RewardsConfig,
        rollout: RolloutConfig,
        run: RunConfig,
        tokenizer: Tokenizer,
        worlds: Mapping[str, World] = NOWHERE,
    ) -> None:
        """`worlds` are those of the sources with an environment. Raises ValueError when a reward of `data.eval` cannot
        be had."""
        self.rollout, self.seed, self.worlds = rollout, run.seed, worlds
        self.grader = Grader(data.eval, rewards, tokenizer)

    def greedy(self, engine: RolloutEngine, prompts: list[Prompt], told: OnFinished = lambda _: None) -> list[Rollout]:
        """A greedy answer to each prompt."""
        return engine.generate(prompts, sampling.greedy(self.rollout), told)

    def answer(
        self, engine: RolloutEngine, prompts: list[Prompt], *, samples: int = 1, told: OnFinished = lambda _: None
    ) -> tuple[list[Rollout], Tally]:
        """A greedy answer to each prompt, and how good those are; with `samples` above 1 also how good that many drawn
        at rollout.temperature are. `told` gets each answer as soon as it is finished. Raises ValueError when a reward
        fails."""
        if not prompts:
            return [], {}
        greedy = self.greedy(engine, prompts, told)
        totals = dict(self.graded(greedy))
        if samples > 1:
            how = sampling.drawn(self.rollout, samples=samples, seed=self.seed)
            drawn = engine.generate(prompts, how, told)
            totals |= tally_samples(*self._graded(drawn), samples=samples)
        return greedy, totals

    def graded(self, greedy: list[Rollout]) -> Tally:
        """How good greedy answers are. Raises ValueError when a reward fails."""
        return tally_greedy(*self._graded(greedy))

    def _graded(self, rollouts: list[Rollout]) -> tuple[list[Rollout], list[float]]:
        """(the first trajectory of each episode of a source that is graded, the episodes' rewards)."""
        rollouts = [rollout for rollout in rollouts if self.grader.rewards[rollout.prompt.source].grades]
        rewards, first = self.grader.grade(rollouts), [its[0] for its in episodes(rollouts)]
        return [rollouts[i] for i in first], [rewards[i] for i in first]


def num_answers(prompts: int, samples: int) -> int:
    """How many answers an evaluation asks for."""
    return prompts * (1 + samples if samples > 1 else 1)


def teacher_accuracies(evaluator: Evaluator, answers: Mapping[str, list[Rollout]]) -> dict[str, float]:
    """How good the teachers' own greedy answers are, by the teacher's name, as eval/teacher/<name>/…"""
    metrics: dict[str, float] = {}
    for name, its in answers.items():
        metrics |= means([evaluator.graded(its)], f"eval/teacher/{name}", bounds=False)
    return metrics


def tally_greedy(rollouts: Sequence[Rollout], rewards: Sequence[float]) -> Tally:
    """`accuracy`, answers with reward 1, and `reward` itself; one rollout a prompt."""
    totals = _Sums()
    for rollout, reward in zip(rollouts, rewards, strict=True):
        totals.add("accuracy", rollout.prompt.source, float(reward >= 1))
        totals.add("reward", rollout.prompt.source, reward)
    return totals.found


def tally_samples(rollouts: Sequence[Rollout], rewards: Sequence[float], *, samples: int) -> Tally:
    """`avg@k`, the mean reward, and `pass@j` for j = k and the powers of 2 below it; k = `samples` rollouts a prompt,
    one prompt's after the other's."""
    sizes = [j for j in (2**i for i in range(1, samples.bit_length())) if j < samples] + [samples]
    totals = _Sums()
    for start in range(0, len(rollouts), samples):
        source, its = rollouts[start].prompt.source, rewards[start : start + samples]
        totals.add(f"avg@{samples}", source, math.fsum(its) / samples)
        right = sum(reward >= 1 for reward in its)
        for j in sizes:
            totals.add(f"pass@{j}", source, pass_at(j, samples=samples, right=right))
    return totals.found


def pass_at(j: int, *, samples: int, right: int) -> float:
    """Probability that at least one of j answers drawn from `samples` without putting back is right: the unbiased
    estimator of pass@j of Chen et al. 2021 (arXiv:2107.03374, equation 1)."""
    return 1.0 - math.comb(samples - right, j) / math.comb(samples, j)


def wilson(mean: float, count: int) -> tuple[float, float]:
    """95 % interval for the mean of `count` numbers in [0, 1]."""
    share = _Z_95**2 / count
    center = (mean + share / 2) / (1 + share)
    half = math.sqrt(mean * (1 - mean) * share + share**2 / 4) / (1 + share)
    return min(max(center - half, 0.0), mean), max(min(center + half, 1.0), mean)  # rounding apart


def means(parts: Iterable[Tally], prefix: str, *, bounds: bool = True) -> dict[str, float]:
    """`<prefix>/<measure>/<source>`, also for the source `all`, from the totals of several replicas; and, with
    `bounds`, the 95 % interval as `<measure>_low` and `<measure>_high`."""
    totals = _Sums()
    for part in parts:
        for (measure, source), (value, count) in part.items():
            totals.add(measure, source, value, count)
            totals.add(measure, ALL, value, count)
    metrics: dict[str, float] = {}
    for (measure, source), (value, count) in totals.found.items():
        mean = metrics[f"{prefix}/{measure}/{source}"] = value / count
        if bounds:
            low, high = wilson(mean, count)
            metrics |= {f"{prefix}/{measure}_low/{source}": low, f"{prefix}/{measure}_high/{source}": high}
    return metrics


class _Sums:
    """Totals in the making."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], tuple[float, int]] = {}

    def add(self, measure: str, source: str, value: float, count: int = 1) -> None:
        before, prompts = self.found.get((measure, source), (0.0, 0))
        self.found[measure, source] = before + value, prompts + count
