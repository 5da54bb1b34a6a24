"""No grade: for sources whose answers cannot be right or wrong, or are too short to be."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_opd.core.types import Prompt
from megatron_opd.rewards.base import Answer, Reward


def _refuse(prompt: Prompt) -> None:
    raise ValueError(
        f"answers to '{prompt.source}' are not graded: its reward is none, and what learns from it needs one"
    )


def _grade(answers: Sequence[Answer]) -> list[float]:
    for prompt, _ in answers:
        _refuse(prompt)
    return []


REWARD = Reward(name="none", grade=_grade, check=_refuse, grades=False)
