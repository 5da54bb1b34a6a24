"""A reward of the user's own: a Python function `(prompt: Prompt, response: str) -> float` by its import path."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_opd.core.imported import imported
from megatron_opd.core.types import Prompt
from megatron_opd.rewards.base import Answer, Reward


def build(name: str) -> Reward:
    """The reward of `module:function`; the working directory is searched, too. Raises ValueError if it is not there."""
    function = imported(name, what="reward", kind="function")

    def grade(answers: Sequence[Answer]) -> list[float]:
        return [_one(name, function, *answer) for answer in answers]

    return Reward(name=name, grade=grade, check=lambda prompt: None, fields=None)


def _one(name: str, function: Callable[[Prompt, str], float], prompt: Prompt, text: str) -> float:
    where = f"reward '{name}', prompt source '{prompt.source}', line {prompt.index + 1}"
    try:
        value = function(prompt, text)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where}: {error!r}") from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= 1:
        raise ValueError(f"{where}: it must return a number from 0 to 1, not {value!r}")
    return number
