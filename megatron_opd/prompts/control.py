"""Control tokens: the tokens by which a template structures a conversation, and texts that must not contain any.

A tool's or an environment's text could spell `<|im_end|>` and begin a turn of its own. So a control token in it is
broken up: a space goes behind its first character (`< |im_end|>`), and the tokenizer reads plain text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_opd.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The control tokens of a tokenizer with a template."""

    ids: Mapping[str, int]
    """By their text: special tokens, and other added tokens that the template writes."""
    pattern: re.Pattern[str]

    def broken(self, value: Any, *, own: Collection[str] = ()) -> tuple[Any, int]:
        """(a text, or all texts in a value of JSON, without control tokens but its `own`; how many there were)."""
        if isinstance(value, str):
            return self._broken(value, own)
        if isinstance(value, Mapping):
            names, counts = zip(*(self.broken(name, own=own) for name in value), strict=True) if value else ((), ())
            found = [self.broken(one, own=own) for one in value.values()]
            return dict(zip(names, (one for one, _ in found), strict=True)), sum(counts) + sum(n for _, n in found)
        if isinstance(value, list | tuple):
            found = [self.broken(one, own=own) for one in value]
            return [one for one, _ in found], sum(n for _, n in found)
        return value, 0

    def _broken(self, text: str, own: Collection[str]) -> tuple[str, int]:
        total = 0
        while True:  # what is left could be one as well; each round makes a text longer, and tokens end somewhere
            count = sum(match[0] not in own for match in self.pattern.finditer(text))
            if not count:
                return text, total
            text = self.pattern.sub(lambda match: match[0] if match[0] in own else _spaced(match[0]), text)
            total += count


def _spaced(token: str) -> str:
    return f"{token[0]} {token[1:]}" if len(token) > 1 else " "


def control_tokens(tokenizer: Tokenizer, template: str | None) -> ControlTokens:
    """The control tokens of a tokenizer with a template's text; without one, its special tokens."""
    return _control_tokens(tokenizer.hf, template or "")


@functools.lru_cache(maxsize=16)
def _control_tokens(hf: Any, template: str) -> ControlTokens:
    added = {token.content: (i, token.special) for i, token in hf.added_tokens_decoder.items()}
    found = {text: i for text, (i, special) in added.items() if text.strip() and (special or text in template)}
    for text in hf.all_special_tokens:
        found.setdefault(text, hf.convert_tokens_to_ids(text))
    longest_first = sorted(map(re.escape, found), key=len, reverse=True)
    return ControlTokens(found, re.compile("|".join(longest_first) or "(?!)"))
