"""Grades episodes by the reward of their prompts' source."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from megatron_opd.config import RewardsConfig, SourceConfig
from megatron_opd.core.episodes import episodes, last_turn
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
        """The reward of each rollout, in order: its episode's. Raises ValueError when a reward fails.

        The answer of an episode is the text of its last turn.
        """
        by_source: dict[str, list[list[int]]] = defaultdict(list)
        for its in episodes(rollouts):
            by_source[rollouts[its[0]].prompt.source].append(its)
        graded: dict[int, float] = {}
        for source, found in by_source.items():
            ends = [rollouts[its[-1]] for its in found]
            answers = [(rollout.prompt, self.tokenizer.decode(last_turn(rollout))) for rollout in ends]
            for its, reward in zip(found, self.rewards[source].grade(answers), strict=True):
                graded |= dict.fromkeys(its, reward)
        return [graded[i] for i in range(len(rollouts))]
