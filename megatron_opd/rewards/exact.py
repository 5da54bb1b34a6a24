"""Right is what equals the reference answer, apart from white space around it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_opd.rewards.base import Answer, Reward, needs_answer


def grade(answers: Sequence[Answer]) -> list[float]:
    """1 for each response that is the reference."""
    return [float(text.strip() == (prompt.answer or "").strip()) for prompt, text in answers]


REWARD = Reward(name="exact", grade=grade, check=needs_answer)
