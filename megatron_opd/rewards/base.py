"""What a reward is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from megatron_opd.core.types import EpisodeLog, Prompt

Answer: TypeAlias = tuple[Prompt, str]
"""A prompt and the text of a response to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reward:
    """A grader of answers."""

    name: str
    grade: Callable[[Sequence[Answer]], list[float]]
    """One number in [0, 1] for each answer, in order; 1 is right. The text is as it was decoded, spaces and all."""
    check: Callable[[Prompt], None]
    """Raises ValueError saying what the prompt's row lacks."""
    fields: tuple[str, ...] | None = ()
    """Fields of a row, besides prompt and answer, that Prompt.extra must keep; None: all of them."""
    trial: Callable[[Prompt], str | None] | None = None
    """Why the prompt's row cannot tell right answers from wrong ones, or None. It takes a while and may be called from
    several threads; None in its place: rows need no trial."""
    of_log: Callable[[EpisodeLog], float] | None = None
    """The reward, from 0 to 1, by how an episode went. It is asked in place of `grade`; None in its place: the text of
    the last turn decides, whatever came before."""
    grades: bool = True
    """Whether it grades at all; evaluation leaves answers to other sources out."""
    note: str = ""
    """What people should know about how it works here."""


def needs_answer(prompt: Prompt) -> str:
    """The prompt's reference answer. Raises ValueError when it has none."""
    if not isinstance(prompt.answer, str):
        raise ValueError(
            'evaluation needs a text field "answer" (or the one that answer_field names), or a last message of the'
            " assistant"
        )
    return prompt.answer
