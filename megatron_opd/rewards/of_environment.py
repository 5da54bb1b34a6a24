"""The environment's own reward: the sum of its rewards over an episode, cut to [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_opd.core.types import EpisodeLog, Prompt
from megatron_opd.rewards.base import Answer, Reward


def of_log(log: EpisodeLog) -> float:
    """The reward of an episode. Raises ValueError for an answer that was given in no environment."""
    if not log.ended:
        raise ValueError("the reward environment is what an environment gives, and this answer was given in none")
    total = sum(log.rewards)
    return 0.0 if math.isnan(total) else min(max(total, 0.0), 1.0)


def _grade(answers: Sequence[Answer]) -> list[float]:
    raise ValueError("the reward environment is of episodes, and a text alone does not tell how one went")


def _check(prompt: Prompt) -> None:
    """Every row will do: what the environment needs of it, the environment checks."""


REWARD = Reward(name="environment", grade=_grade, check=_check, of_log=of_log)
