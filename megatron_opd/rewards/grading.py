"""Grades answers by the reward of their prompts' source."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from megatron_opd.config import RewardsConfig, SourceConfig
from megatron_opd.core.types import Rollout
from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.rewards import build_reward


class Grader:
    """The rewards of some sources."""

    def __init__(self, sources: Sequence[SourceConfig], settings: RewardsConfig, tokenizer: Tokenizer) -> None:
        """Raises ValueError when a reward cannot be had."""
        self.tokenizer = tokenizer
        self.rewards = {source.name: build_reward(source.reward, settings) for source in sources}

    def grade(self, rollouts: Sequence[Rollout]) -> list[float]:
        """The reward of each rollout, in order. Raises ValueError when a reward fails."""
        by_source: dict[str, list[int]] = defaultdict(list)
        for i, rollout in enumerate(rollouts):
            by_source[rollout.prompt.source].append(i)
        graded: dict[int, float] = {}
        for source, indices in by_source.items():
            answers = [(rollouts[i].prompt, self.tokenizer.decode(rollouts[i].response_ids)) for i in indices]
            graded |= zip(indices, self.rewards[source].grade(answers), strict=True)
        return [graded[i] for i in range(len(rollouts))]
