"""Many prompts in little memory: Python's own objects would take ten times the space of a large file.

Token ids lie in one array, four bytes each, everything else in one buffer; a Prompt is made when it is asked for.
"""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import overload

from megatron_opd.core.types import Prompt
from megatron_opd.prompts.fingerprint import Fingerprint

_OTHERS = [f.name for f in dataclasses.fields(Prompt) if f.name not in ("source", "index", "token_ids")]
"""Fields of a prompt that are kept as JSON."""


class PackedPrompts(Sequence[Prompt]):
    """The prompts of one source, in its order."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.dropped = 0
        """Prompts of the source that were too long."""
        self.fingerprint: Fingerprint | None = None
        """The fingerprint of the source, once all of it is read."""
        self._index = array("q")
        self._ids, self._ids_end = array("i"), array("q", [0])
        self._others, self._others_end = bytearray(), array("q", [0])

    def append(self, prompt: Prompt) -> None:
        """Add a prompt of this source behind the others."""
        self._index.append(prompt.index)
        self._ids.extend(prompt.token_ids)
        self._ids_end.append(len(self._ids))
        others = json.dumps([getattr(prompt, name) for name in _OTHERS], ensure_ascii=False)
        self._others += others.encode("utf-8", "surrogatepass")
        self._others_end.append(len(self._others))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max((end - begin for begin, end in pairwise(self._ids_end)), default=0)

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, at: int) -> Prompt: ...
    @overload
    def __getitem__(self, at: slice) -> list[Prompt]: ...
    def __getitem__(self, at: int | slice) -> Prompt | list[Prompt]:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        i = range(len(self))[at]
        others = self._others[self._others_end[i] : self._others_end[i + 1]].decode("utf-8", "surrogatepass")
        fields = dict(zip(_OTHERS, json.loads(others), strict=True))
        fields["answer_ids"] = tuple(fields["answer_ids"])
        fields["teacher_ids"] = {name: tuple(ids) for name, ids in fields["teacher_ids"].items()}
        fields["messages"] = tuple(fields["messages"])
        fields["teacher_messages"] = {name: tuple(its) for name, its in fields["teacher_messages"].items()}
        token_ids = tuple(self._ids[self._ids_end[i] : self._ids_end[i + 1]])
        return Prompt(source=self.source, index=self._index[i], token_ids=token_ids, **fields)
