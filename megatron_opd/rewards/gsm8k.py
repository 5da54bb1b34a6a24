"""Right is what ends in the number that the reference ends in, however it is written.

The number of a text stands after its last `####` (the format of the data set, Cobbe et al. 2021, arXiv:2110.14168),
else in its last `\\boxed{}`, else it is the last number there is. Numbers are compared exactly, as fractions: 1,000
and 1000.0 are one; thousands separators, currency signs, units and percent signs do not count, and nothing is
rounded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from megatron_opd.core.types import Prompt
from megatron_opd.rewards.base import Answer, Reward, needs_answer

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus sign is one where nothing stands before it that could be subtracted from.
_NUMBER = re.compile(rf"((?<![\w.)\]}}])-)?(?:[$€£](-)?)?({_DIGITS})(?:\s?/\s?({_DIGITS}))?", re.ASCII)
_AFTER_HASHES = re.compile(r"####([^\n]*)")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_LATEX = [
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,!; ]"), ""),
    (re.compile(r"\\\$"), "$"),
    (re.compile("[\N{MINUS SIGN}\N{EN DASH}]"), "-"),
]


def final_number(text: str) -> Fraction | None:
    """The number that the text gives as its answer, or None where there is none."""
    for pattern, written in _LATEX:
        text = pattern.sub(written, text)
    after_hashes = [found for part in _AFTER_HASHES.findall(text) if (found := _numbers(part))]
    if after_hashes:
        return after_hashes[-1][0]
    boxed = [found for part in _BOXED.findall(text) if (found := _numbers(part))]
    if boxed:
        return boxed[-1][-1]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[Fraction]:
    found = []
    for minus, inner_minus, above, below in _NUMBER.findall(text):
        try:
            value = Fraction(above.replace(",", "")) / Fraction(below.replace(",", "") if below else 1)
        except (ValueError, ZeroDivisionError):  # thousands of digits, which Python does not read; x / 0
            continue
        found.append(-value if minus or inner_minus else value)
    return found


def grade(answers: Sequence[Answer]) -> list[float]:
    """1 for each response whose number is the reference's."""
    rewards = []
    for prompt, text in answers:
        given = final_number(text)
        rewards.append(float(given is not None and given == final_number(prompt.answer or "")))
    return rewards


def check(prompt: Prompt) -> None:
    """Raises ValueError when the reference has no number."""
    if final_number(needs_answer(prompt)) is None:
        raise ValueError('the reward gsm8k needs a number in "answer"')


REWARD = Reward(name="gsm8k", grade=grade, check=check)
