"""One training answer in a few lines, as people read it on the console and in train.log."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

from megatron_opd.core.types import Rollout

_PROMPT, _ANSWER = 300, 600
"""Letters that are shown of each."""


def lines(rollout: Rollout, answer: str, told: Mapping[str, float | None]) -> list[str]:
    """`told`: by teacher, the log-probability of the whole answer; None where it was not asked."""
    prompt = rollout.prompt
    parts = [f"answer to {prompt.source}, row {prompt.index + 1}"]
    parts += [f"by the {rollout.origin}"] if rollout.origin != "student" else []
    parts += [f"reward {rollout.reward:.3g}"] if rollout.reward is not None else []
    parts += [f"{rollout.num_learnt} tokens{', cut' if rollout.finish == 'length' else ''}"]
    return [
        "  ".join([*parts, *_confidence(rollout, told)]),
        f"  prompt: {printable(prompt.text, _PROMPT, keep_end=True)}",
        f"  answer: {printable(answer, _ANSWER)}",
    ]


def _confidence(rollout: Rollout, told: Mapping[str, float | None]) -> list[str]:
    """Log-probabilities a token: the sampler's, and each teacher's with the distance between the two."""
    count = rollout.num_learnt
    if not count or rollout.origin != "student":
        return []
    own = sum(rollout.logps) / count
    theirs = {name: logp / count for name, logp in told.items() if logp is not None}
    found = [f"{name} {logp:.3g} (kl {own - logp:.2g})" for name, logp in theirs.items()]
    return ["  ".join([f"logprob a token: student {own:.3g}", *found])]


def printable(text: str, most: int, *, keep_end: bool = False) -> str:
    """A text in one line, cut to `most` letters, without anything that a terminal would take for a command.

    `keep_end`: what is cut out is in the middle, because prompts end with the question.
    """
    line = "".join(_letter(letter) for letter in text)
    if len(line) <= most:
        return line
    if not keep_end:
        return f"{line[:most]} …"
    return f"{line[: most // 2]} … {line[-(most // 2) :]}"


def _letter(letter: str) -> str:
    if letter in "\n\r\u2028\u2029":
        return "⏎"
    if letter == "\t":
        return " "
    # Controls, directions of writing, private letters, halves of surrogate pairs; an emoji's joiner among them.
    return "\N{REPLACEMENT CHARACTER}" if unicodedata.category(letter).startswith("C") else letter


def place(rollouts: Sequence[Rollout]) -> int:
    """The answer of a step to show: the student's first one, or else the first."""
    return next((i for i, rollout in enumerate(rollouts) if rollout.origin == "student"), 0)
