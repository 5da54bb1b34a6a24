"""Right is what ends in the number that the reference ends in, however it is written.

The number of a text begins the line behind a `####` (the format of the data set, Cobbe et al. 2021, arXiv:2110.14168),
or is in a `\\boxed{}`, whichever comes last; else it is the last number there is. An expression in either is read by
math-verify; a box that holds several numbers and no expression gives none. Numbers are compared exactly, as fractions:
1,000 and 1000.0 are one; thousands separators, currency signs, units and percent signs do not count, and nothing is
rounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import TypeAlias

from megatron_opd.core.types import Prompt
from megatron_opd.rewards import mathematics
from megatron_opd.rewards.base import Answer, Reward, needs_answer

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?!\w))?"
# A minus sign is one where nothing stands before it that could be subtracted from. A whole number before a fraction
# belongs to it: 2 1/2.
_NUMBER = re.compile(
    rf"((?<![\w.)\]}}])-)?(?:[$€£]\s?(-)?)?(?:(\d+)\s+(?=\d+\s?/\s?\d))?({_DIGITS})(?:\s?/\s?({_DIGITS}))?", re.ASCII
)
_HASHES = re.compile(r"####([^\n]*)")
_BEFORE_A_NUMBER = re.compile(r"[\s*_`(\\]*(?:(?:the )?(?:final )?answer(?: is)?\s*[:=]?)?[\s*_`(\\]*", re.IGNORECASE)
_GOES_ON = re.compile(r"\s*(?:\*\*?|[-+/^×·÷:])\s*[$€£({]?\s?\d")
"""Behind a number: it is the beginning of an expression. Behind a number and `=` stands how one gets to it."""
_ARITHMETIC = re.compile(r"[\d\s.,$€£(){}*+/^×·÷:=-]*\d[)}]*")
_JOINS = re.compile(r"[*+/^×·÷]")
_BESIDE = re.compile(r"\d\s*(?:;|\bor\b|\band\b|\bto\b)\s*[$€£]?-?\.?\d|\d\s+\d")
"""Two numbers that no sign joins."""
_HEADING = re.compile(r"\d+[.):]\s+[^\W\d]")
_BOX = re.compile(r"\\f?boxed?\s*\{")
_LATEX = [
    (re.compile(r"(?<=\d)\s*\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,!; ]"), ""),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile("(?<=\\d)[\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}](?=\\d{3}(?!\\d))"), ","),
    (re.compile(r"(?<![\d.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.,])"), lambda found: found[0].replace(".", "")),
    (re.compile("[\N{MINUS SIGN}\N{EN DASH}]"), "-"),
    (re.compile(r"(^|[=:{(#])([ \t]*[$€£]?)-[ \t]+(?=[$€£]?[\d.])"), r"\1\2-"),
]
_UNIT = re.compile(r"\\(?:text|mathrm|mbox|textbf)\s*\{[^{}]*\}(?:\^(?:\{-?\d+\}|\d|\\circ))?|\^\{?\\circ\}?")
_Read: TypeAlias = Callable[[], Fraction | None]
"""Reads one of the numbers that a text may give; it may ask a process."""
_FONT = re.compile(r"\\(?:text|math)?(?:bf|rm|it|sf|normal)?\s*\{\s*(-?[\d.,/]+)\s*\}")
_MOST_CHARACTERS, _LONGEST_EXPONENT = 200_000, 3


def final_number(text: str) -> Fraction | None:
    """The number that the text gives as its answer, or None where there is none."""
    text = text[-_MOST_CHARACTERS:]
    given = [*_behind_hashes(text), *_in_boxes(text)]
    if given:
        return max(given, key=lambda one: one[0])[1]()
    numbers = _numbers(_plain(text))
    return numbers[-1] if numbers else None


def _plain(text: str) -> str:
    for pattern, written in _LATEX:
        text = pattern.sub(written, text)
    return text


def _behind_hashes(text: str) -> Iterator[tuple[int, _Read]]:
    """(place, what reads it) of each `####` that a number follows; "#### Step 2" and "#### 2. Add" are headings."""
    for found in _HASHES.finditer(text):
        line = _plain("####" + found[1])[4:]
        begin = _BEFORE_A_NUMBER.match(line).end()
        number = _NUMBER.match(line, begin)
        if number is None or _HEADING.match(line, begin) or not (values := _numbers(number[0])):
            continue
        if _GOES_ON.match(line, number.end()):
            yield found.start(), partial(_computed, line[begin:])
        else:
            yield found.start(), partial(values.__getitem__, 0)


def _computed(line: str) -> Fraction | None:
    """The number of an expression that begins a line: what stands behind its `=`, or what it comes to. None for numbers
    that only `-` or `:` join: a difference, a range, a date and a time look alike."""
    written = _ARITHMETIC.match(line)[0]
    if "=" in written:
        return next(iter(_numbers(written.rpartition("=")[2])), None)
    return mathematics.number(written) if _JOINS.search(written) else None


def _in_boxes(text: str) -> Iterator[tuple[int, _Read]]:
    """(place, what reads it) of each box that is closed and holds a digit."""
    for found in _BOX.finditer(text):
        depth = 1
        for end in range(found.end(), min(len(text), found.end() + 1000)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                content = text[found.end() : end]
                if re.search(r"\d", content):
                    yield found.start(), partial(_boxed, content)
                break


def _boxed(content: str) -> Fraction | None:
    """The number in a box, which may be an expression; None where it holds several."""
    content = re.sub(r"\\[,!; %$]|[%$]", "", content)
    content = _FONT.sub(r"\1", content)
    without_units = _UNIT.sub(" ; ", content)
    content = without_units if re.search(r"\d", without_units) else content
    content = content.strip("; ")
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", _plain(content)).strip()
    if _NUMBER.fullmatch(plain) and (values := _numbers(plain)):
        return values[0]
    numbers = _numbers(plain)
    if _BESIDE.search(plain):
        return None
    found = mathematics.number(_plain(content) if "^" not in content and "\\" not in _plain(content) else content)
    return numbers[0] if found is None and len(numbers) == 1 and "\\" not in plain else found


def _numbers(text: str) -> list[Fraction]:
    found = []
    for minus, inner_minus, whole, above, below in _NUMBER.findall(text):
        if any(
            len(re.sub(r".*[eE][+-]?", "", part)) > _LONGEST_EXPONENT for part in (above, below) if "e" in part.lower()
        ):
            continue
        try:
            value = Fraction(above.replace(",", "")) / Fraction(below.replace(",", "") if below else 1)
            value += Fraction(whole or 0)
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
