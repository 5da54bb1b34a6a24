"""Control tokens: the tokens by which a template structures a conversation, and texts that must not contain any.

A tool's or an environment's text could spell `<|im_end|>` and begin a turn of its own. So a control token in it is
broken up: a space goes behind its first character (`< |im_end|>`), and the tokenizer reads plain text.
"""

from __future__ import annotations

import functools
import itertools
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
    of_structure: frozenset[int]
    """All ids but that of unknown characters, which any text may have."""

    def broken(self, value: Any, *, own: Collection[str] = ()) -> tuple[Any, int]:
        """(a text, or all texts in a value of JSON, without control tokens but its `own`; how many there were).

        Half of a surrogate pair, which no tokenizer takes, becomes a question mark.
        """
        if isinstance(value, str):
            return self._broken(value.encode("utf-8", "replace").decode(), own)
        if isinstance(value, Mapping):
            pairs, count = self.broken([[name, one] for name, one in value.items()], own=own)
            return dict(pairs), count
        if isinstance(value, list | tuple):
            found = [self.broken(one, own=own) for one in value]
            return [one for one, _ in found], sum(count for _, count in found)
        return value, 0

    def _broken(self, text: str, own: Collection[str]) -> tuple[str, int]:
        total = 0
        for spaced in itertools.count():
            count = sum(match[0] not in own for match in self.pattern.finditer(text))
            if not count:
                break
            # What a space leaves can be a control token again; one that begins with blanks always is.
            put = functools.partial(_apart, own=own, is_blank=spaced >= _SPACES)
            text = self.pattern.sub(put, text)
            total += count
        return text, total


_SPACES = 4


def _apart(match: re.Match[str], *, own: Collection[str], is_blank: bool) -> str:
    token = match[0]
    if token in own:
        return token
    return " " if is_blank or len(token) == 1 else f"{token[0]} {token[1:]}"


def control_tokens(tokenizer: Tokenizer, template: str | None) -> ControlTokens:
    """The control tokens of a tokenizer with a template's text; without one, its special tokens."""
    return _control_tokens(tokenizer.hf, template or "")


@functools.lru_cache(maxsize=16)
def _control_tokens(hf: Any, template: str) -> ControlTokens:
    added = {token.content: (i, token.special) for i, token in hf.added_tokens_decoder.items()}
    known = {text: i for text, (i, special) in added.items() if special or text in template}
    known |= {text: hf.convert_tokens_to_ids(text) for text in hf.all_special_tokens}
    found = {text: i for text, i in known.items() if text.strip()}  # blanks are in every text
    longest_first = sorted(map(re.escape, found), key=len, reverse=True)
    model = getattr(getattr(hf, "backend_tokenizer", None), "model", None)
    unknown = (hf.unk_token, getattr(model, "unk_token", None))
    of_structure = frozenset(i for text, i in found.items() if text not in unknown)
    return ControlTokens(found, re.compile("|".join(longest_first) or "(?!)"), of_structure)
