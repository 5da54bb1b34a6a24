"""Grades episodes by the reward of their prompts' source."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from megatron_opd.config import RewardsConfig, SourceConfig
from megatron_opd.core.episodes import episodes, last_turn
from megatron_opd.core.types import Prompt, Rollout
from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.rewards import build_reward
from megatron_opd.rewards.base import Reward
from megatron_opd.rewards.thinking import KNOWN, markers_of, response_text


class Grader:
    """The rewards of some sources. Somebody learns from them: a reward that fails ends the run."""

    def __init__(self, sources: Sequence[SourceConfig], settings: RewardsConfig, tokenizer: Tokenizer) -> None:
        """Raises ValueError when a reward cannot be had."""
        self.tokenizer = tokenizer
        self.markers = markers_of(tokenizer, settings.thinking) if sources else KNOWN[0]
        self.rewards = {source.name: build_reward(source.reward, settings, self.markers) for source in sources}

    def grade(self, rollouts: Sequence[Rollout]) -> list[float]:
        """The reward of each rollout, in order: its episode's. Raises ValueError when a reward fails.

        The answer of an episode is the text of its last turn, without the thinking; a reward with `of_log` is asked
        about how the episode went instead.
        """
        by_source: dict[str, list[list[int]]] = defaultdict(list)
        for its in episodes(rollouts):
            by_source[rollouts[its[0]].prompt.source].append(its)
        graded: dict[int, float] = {}
        for source, found in by_source.items():
            rewards = self._grade(self.rewards[source], [rollouts[its[-1]] for its in found])
            for its, reward in zip(found, rewards, strict=True):
                graded |= dict.fromkeys(its, reward)
        return [graded[i] for i in range(len(rollouts))]

    def _grade(self, reward: Reward, ends: Sequence[Rollout]) -> list[float]:
        """The rewards of episodes by their last trajectories."""
        if reward.of_log is not None:
            return [reward.of_log(rollout.log) for rollout in ends]
        return reward.grade([(rollout.prompt, self._text(rollout)) for rollout in ends])

    def news(self) -> list[str]:
        """Nothing: what goes wrong is raised."""
        return []

    def _text(self, rollout: Rollout) -> str:
        """The last turn, with the markers of its thinking."""
        turn = last_turn(rollout)
        # Nothing that is learnt follows the last turn, so what is behind it is an environment's.
        end = max((i + 1 for i, is_learnt in enumerate(rollout.learnt) if is_learnt), default=0)
        before = (*rollout.prompt.token_ids, *rollout.token_ids[: end - len(turn)])
        return response_text(self.tokenizer, before, turn, self.markers)


class Watcher:
    """The rewards of some sources, for people to see: what cannot be graded is left out, and said once."""

    def __init__(self, sources: Sequence[SourceConfig], settings: RewardsConfig, tokenizer: Tokenizer) -> None:
        """Raises ValueError when a reward cannot be had."""
        self.grader = Grader(sources, settings, tokenizer)
        self._failed: set[str] = set()
        self._has_enough: dict[tuple[str, int], bool] = {}
        """By source and row."""
        self._news: list[str] = []

    def grade(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """The reward of each rollout, in order; None for answers that are not the student's, for rows without what
        their reward needs, and where a reward fails."""
        by_source: dict[str, list[int]] = defaultdict(list)
        for i, rollout in enumerate(rollouts):
            if rollout.origin == "student" and self._can_grade(rollout.prompt):
                by_source[rollout.prompt.source].append(i)
        found: list[float | None] = [None] * len(rollouts)
        for source, its in by_source.items():
            try:
                graded = self.grader.grade([rollouts[i] for i in its])
            except Exception as error:  # whatever a user's own function raises
                self._fail(source, error)
                continue
            for i, reward in zip(its, graded, strict=True):
                found[i] = reward
        return found

    def news(self) -> list[str]:
        """Warnings that nobody has heard yet."""
        news, self._news = self._news, []
        return news

    def _can_grade(self, prompt: Prompt) -> bool:
        """Whether a row has what its reward needs, which is asked once: `math` asks a process, `code` reads tests."""
        row = prompt.source, prompt.index
        if row not in self._has_enough:
            try:
                self.grader.rewards[prompt.source].check(prompt)
                self._has_enough[row] = True
            except ValueError:
                self._has_enough[row] = False
        return self._has_enough[row]

    def _fail(self, source: str, error: Exception) -> None:
        if source not in self._failed:
            self._failed.add(source)
            self._news.append(
                f"warning: training answers of {source} are not graded now, and the run goes on: {error}; repair the"
                " reward, or turn rewards.watch off"
            )
