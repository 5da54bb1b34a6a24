"""Grades episodes by the reward of their prompts' source."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from megatron_opd.config import RewardsConfig, SourceConfig
from megatron_opd.core.episodes import episodes, last_turn
from megatron_opd.core.types import Rollout
from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.rewards import build_reward
from megatron_opd.rewards.thinking import KNOWN, markers_of, response_text


class Grader:
    """The rewards of some sources."""

    def __init__(self, sources: Sequence[SourceConfig], settings: RewardsConfig, tokenizer: Tokenizer) -> None:
        """Raises ValueError when a reward cannot be had."""
        self.tokenizer = tokenizer
        self.markers = markers_of(tokenizer, settings.thinking) if sources else KNOWN[0]
        self.rewards = {source.name: build_reward(source.reward, settings, self.markers) for source in sources}

    def grade(self, rollouts: Sequence[Rollout]) -> list[float]:
        """The reward of each rollout, in order: its episode's. Raises ValueError when a reward fails.

        The answer of an episode is the text of its last turn, without the thinking.
        """
        by_source: dict[str, list[list[int]]] = defaultdict(list)
        for its in episodes(rollouts):
            by_source[rollouts[its[0]].prompt.source].append(its)
        graded: dict[int, float] = {}
        for source, found in by_source.items():
            ends = [rollouts[its[-1]] for its in found]
            answers = [(rollout.prompt, self._text(rollout)) for rollout in ends]
            for its, reward in zip(found, self.rewards[source].grade(answers), strict=True):
                graded |= dict.fromkeys(its, reward)
        return [graded[i] for i in range(len(rollouts))]

    def _text(self, rollout: Rollout) -> str:
        """The last turn, with the markers of its thinking."""
        turn = last_turn(rollout)
        # Nothing that is learnt follows the last turn, so what is behind it is an environment's.
        end = max((i + 1 for i, is_learnt in enumerate(rollout.learnt) if is_learnt), default=0)
        before = (*rollout.prompt.token_ids, *rollout.token_ids[: end - len(turn)])
        return response_text(self.tokenizer, before, turn, self.markers)
