"""The answer is what follows the thinking: the one place that takes a model's thinking away before it is graded.

Thinking stands between two markers, `<think>` and `</think>` for most models. Where the chat template opens it, the
answer begins inside of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

from megatron_opd.core.types import Prompt
from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.rewards.base import Answer, Reward

Markers: TypeAlias = tuple[str, str]
"""What opens thinking, and what closes it."""

KNOWN: tuple[Markers, ...] = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<thinking>", "</thinking>"))
_LOOK_BACK = 64
"""Tokens at the end of a prompt that may hold the opening marker and the white space behind it."""


def markers_of(tokenizer: Tokenizer, named: Sequence[str] = ()) -> Markers:
    """The markers that are `named`, else the first known pair that the tokenizer or its chat template has."""
    if named:
        return named[0], named[1]
    template = str(getattr(tokenizer.hf, "chat_template", None) or "")
    vocabulary = tokenizer.hf.get_vocab()
    for opens, closes in KNOWN:
        if closes in template or closes in vocabulary:
            return opens, closes
    return KNOWN[0]


def after_thinking(text: str, markers: Markers = KNOWN[0]) -> str:
    """What follows the thinking; empty where thinking does not end, all of the text where there is none."""
    opens, closes = markers
    _, closed, answer = text.rpartition(closes)
    return "" if opens in answer else answer if closed else text


def without_thinking(reward: Reward, markers: Markers = KNOWN[0]) -> Reward:
    """The reward of answers without their thinking, compared with references without theirs."""

    def grade(answers: Sequence[Answer]) -> list[float]:
        return reward.grade([(_without(prompt, markers), after_thinking(text, markers)) for prompt, text in answers])

    def check(prompt: Prompt) -> None:
        reward.check(_without(prompt, markers))

    return dataclasses.replace(reward, grade=grade, check=check)


def _without(prompt: Prompt, markers: Markers) -> Prompt:
    if not isinstance(prompt.answer, str) or markers[1] not in prompt.answer:
        return prompt
    return dataclasses.replace(prompt, answer=after_thinking(prompt.answer, markers))


def response_text(tokenizer: Tokenizer, before: Sequence[int], response: Sequence[int], markers: Markers) -> str:
    """The text of a response with its markers, also where they are special tokens, which decoding leaves out. It
    begins with the opening marker where the tokens `before` it have opened thinking.

    before, response: token ids of all that precedes, and of the response.
    """
    decode = _with_markers(tokenizer, markers)
    opens, closes = markers
    _, _, opened = decode(before[-_LOOK_BACK:]).rpartition(opens)
    is_open = not opened.strip() and opens in decode(before[-_LOOK_BACK:]) and closes not in opened
    return (opens if is_open else "") + decode(response)


def _with_markers(tokenizer: Tokenizer, markers: Markers) -> Callable[[Sequence[int]], str]:
    vocabulary = tokenizer.hf.get_vocab()
    special = set(tokenizer.hf.all_special_ids)
    hidden = {vocabulary[marker]: marker for marker in markers if vocabulary.get(marker) in special}

    def decode(ids: Sequence[int]) -> str:
        text, part = "", []
        for i in ids:
            if i in hidden:
                text, part = text + tokenizer.decode(part) + hidden[i], []
            else:
                part.append(i)
        return text + tokenizer.decode(part)

    return decode
