"""One training answer in a few lines, as people read it on the console and in train.log."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

from megatron_opd.core.types import EpisodeLog, Rollout

_PROMPT, _ANSWER, _TURN = 300, 600, 200
"""Letters that are shown of each."""
_SAID = 12
"""Turns, and texts of the environment, that are shown of an episode."""


def lines(
    rollout: Rollout,
    answer: str,
    told: Mapping[str, float | None],
    *,
    said: Sequence[tuple[str, str]] = (),
    trajectories: int = 1,
) -> list[str]:
    """`told`: by teacher, the log-probability of the whole answer; None where it was not asked. `said`: who wrote
    what, where that is more than the answer. `trajectories`: how many its episode has."""
    prompt = rollout.prompt
    parts = [f"answer to {prompt.source}, row {prompt.index + 1}"]
    parts += [f"by the {rollout.origin}"] if rollout.origin != "student" else []
    parts += [f"reward {rollout.reward:.3g}"] if rollout.reward is not None else []
    parts += [f"{rollout.num_learnt} tokens{', cut' if rollout.finish == 'length' else ''}"]
    parts += _episode(rollout.log, trajectories) if rollout.log.ended else []
    return [
        "  ".join([*parts, *_confidence(rollout, told)]),
        f"  prompt: {printable(prompt.text, _PROMPT, keep_end=True)}",
        *(_turns(said) if len(said) > 1 else [f"  answer: {printable(answer, _ANSWER)}"]),
    ]


def _episode(log: EpisodeLog, trajectories: int) -> list[str]:
    turns, calls = (f"{n} {what}{'' if n == 1 else 's'}" for n, what in ((log.turns, "turn"), (log.calls, "call")))
    first = [f"the first of {trajectories} trajectories"] if trajectories > 1 else []
    return [f"{turns}, {calls}, ended: {log.ended}", *first]


def _turns(said: Sequence[tuple[str, str]]) -> list[str]:
    shown = [f"  {who}: {printable(text.strip(), _TURN)}" for who, text in said[:_SAID]]
    return [*shown, f"  … and {len(said) - _SAID} more"] if len(said) > _SAID else shown


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
