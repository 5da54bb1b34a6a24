"""Right is what equals the reference answer, apart from white space around it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_opd.core.types import Prompt
from megatron_opd.rewards.base import Answer, Reward, needs_answer


def grade(answers: Sequence[Answer]) -> list[float]:
    """1 for each response that is the reference."""
    return [float(text.strip() == (prompt.answer or "").strip()) for prompt, text in answers]


def check(prompt: Prompt) -> None:
    """Raises ValueError for a row without a reference, or with an empty one, which an empty response would equal."""
    if not needs_answer(prompt).strip():
        raise ValueError("the reference answer is empty, so the reward exact would be 1 for saying nothing")


REWARD = Reward(name="exact", grade=grade, check=check)
