"""Right is what follows the instructions of its prompt, as the checker of IFEval sees it (Zhou et al. 2023,
arXiv:2311.07911): their strict test, without the loose one's second tries.

The checker is the authors', as lm-eval keeps it (the extra `ifeval`). A row has `instruction_id_list`, names such as
`length_constraints:number_words`, and `kwargs`, as many objects with the arguments of each. Where an argument is
missing or odd the checker draws one at random; here such a row is an error, so that a grade never depends on chance.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from megatron_opd.config import RewardsConfig
from megatron_opd.core.types import Prompt
from megatron_opd.rewards.base import Answer, Reward

Checkers: TypeAlias = Mapping[str, Callable[[str], Any]]
"""lm-eval's class of each instruction, by the instruction's name."""

_PUNKT = "tokenizers/punkt_tab/english/"
_LETTERS = "keywords:letter_frequency"
_PROBE = "This is an answer. Nobody wrote it."


def build(settings: RewardsConfig) -> Reward:
    """The reward. Raises ValueError when the checker, or the data that it needs, is not installed."""
    checkers = _checkers()
    grade = functools.partial(_grade, checkers=checkers, by_instruction=settings.ifeval == "instruction")
    return Reward(
        name="ifeval",
        grade=grade,
        check=functools.partial(check, checkers=checkers),
        fields=("instruction_id_list", "kwargs"),
    )


def _checkers() -> Checkers:
    try:
        import langdetect
        import nltk

        # Before lm-eval's module, which would download what is missing, from every process.
        nltk.data.find(_PUNKT)
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    except ImportError as error:
        raise ValueError(f"IFEval's checker is not installed: pip install 'megatron-opd[ifeval]' ({error})") from error
    except LookupError:
        raise ValueError(
            "IFEval's checker needs nltk's rules for splitting sentences: run python -m nltk.downloader punkt_tab, or"
            " copy them to a folder and set NLTK_DATA to it"
        ) from None
    langdetect.DetectorFactory.seed = 0  # it samples from the text; without a seed, differently each time
    return INSTRUCTION_DICT


def _grade(answers: Sequence[Answer], *, checkers: Checkers, by_instruction: bool) -> list[float]:
    rewards = []
    for prompt, text in answers:
        followed = [_follows(text, name, given, checkers) for name, given in _instructions(prompt)]
        rewards.append(sum(followed) / len(followed) if by_instruction else float(all(followed)))
    return rewards


def _follows(text: str, name: str, given: dict[str, Any], checkers: Checkers) -> bool:
    """The strict test of one instruction; an empty answer follows none."""
    if not text.strip():
        return False
    if _counts_a_sign(name, given):
        text, given = "a" * text.lower().count(given["letter"].lower()), {**given, "letter": "a"}
    try:
        return bool(_instruction(name, given, checkers).check_following(text))
    except RecursionError:  # "[[[[[[…", where JSON is asked for
        return False


def _counts_a_sign(name: str, given: dict[str, Any]) -> bool:
    """Whether what is to be counted is no letter of the alphabet; the checker would draw one instead.

    Two rows of google/IFEval do, with `#` and `!`.
    """
    letter = given.get("letter")
    is_one = name == _LETTERS and isinstance(letter, str) and len(letter) == 1
    return is_one and not "a" <= letter.lower() <= "z"


def _instruction(name: str, given: dict[str, Any], checkers: Checkers) -> Any:
    """lm-eval's instruction with its arguments. Raises ValueError where it would draw one at random."""
    instruction, before = checkers[name](name), random.getstate()
    try:
        instruction.build_description(**given)
        if random.getstate() != before:
            takes = ", ".join(instruction.get_instruction_args_keys())
            raise ValueError(f"an argument is missing or out of range; it takes {takes}")
    finally:
        random.setstate(before)
    return instruction


def _instructions(prompt: Prompt) -> list[tuple[str, dict[str, Any]]]:
    """The row's instructions with their arguments, without the nulls that the hub's table fills rows up with."""
    names, kwargs = prompt.extra["instruction_id_list"], prompt.extra["kwargs"]
    given = [{name: value for name, value in (one or {}).items() if value is not None} for one in kwargs]
    return list(zip(names, given, strict=True))


def check(prompt: Prompt, *, checkers: Checkers) -> None:
    """Raises ValueError when the row lacks instructions, or has one that the checker does not know or cannot test."""
    names, kwargs = prompt.extra.get("instruction_id_list"), prompt.extra.get("kwargs")
    if not isinstance(names, list) or not names:
        raise ValueError('the reward ifeval needs "instruction_id_list", a list of names of instructions')
    is_list = isinstance(kwargs, list) and all(one is None or isinstance(one, dict) for one in kwargs)
    if not is_list or len(kwargs) != len(names):
        raise ValueError('the reward ifeval needs "kwargs", a list of an object for each of "instruction_id_list"')
    for name, given in _instructions(prompt):
        if not isinstance(name, str) or name not in checkers:
            raise ValueError(f"lm-eval's checker of IFEval has no instruction {name!r}")
        try:
            _follows(_PROBE, name, given, checkers)
        except Exception as error:  # lm-eval's, of any kind: arguments that do not fit, a keyword that is no pattern
            raise ValueError(f'"{name}" with the "kwargs" {given}: {error!r}') from error
