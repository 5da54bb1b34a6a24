"""Many answers at once: every forward pass gives a token to each one that is not finished.

Answers that end leave the batch, and others take their place, so the batch stays full however long the answers are.
The tokens of an answer depend on its own ids and random numbers alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from megatron_opd.rollout.drawing import draw
from megatron_opd.rollout.reading import BatchReader

MAX_ROWS = 256
"""Answers that are decoded together."""
CACHE_BYTES = 2**30
"""Memory for keys and values; a single answer may take more."""
_REFILL = 4
"""Answers are begun when this part of the batch is free (a quarter): prompts are read several at a time."""


@dataclass(frozen=True, slots=True)
class Begun:
    """An answer to be drawn to its end."""

    ids: tuple[int, ...]
    """The tokens before: a prompt, and of an answer that was begun already its tokens so far."""
    uniforms: Sequence[float]
    """A random number in [0, 1) for each token that it may still have; at least one."""


@dataclass(slots=True)
class Ended:
    """The tokens that were drawn."""

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    """In nats, of the distribution that was drawn from."""
    is_whole: bool = False
    """Whether its last token ends it; otherwise there was no room for more."""


@dataclass(slots=True)
class _Row:
    """An answer that has a place in the batch."""

    number: int
    begun: Begun
    ended: Ended = field(default_factory=Ended)

    @property
    def last(self) -> int:
        """The token that is to be read next."""
        return self.ended.ids[-1] if self.ended.ids else self.begun.ids[-1]

    @property
    def at(self) -> int:
        """Its position."""
        return len(self.begun.ids) + len(self.ended.ids) - 1

    @property
    def uniform(self) -> float:
        """The random number of the token after it."""
        return self.begun.uniforms[len(self.ended.ids)]

    def add(self, token: int, logp: float, eos_ids: tuple[int, ...]) -> bool:
        """Whether it has come to its end with this token."""
        self.ended.ids.append(token)
        self.ended.logps.append(logp)
        self.ended.is_whole = token in eos_ids
        return self.ended.is_whole or len(self.ended.ids) == len(self.begun.uniforms)


@torch.no_grad()
def decode(
    reader: BatchReader,
    answers: Sequence[Begun],
    *,
    temperature: float,
    eos_ids: tuple[int, ...],
    on_ended: Callable[[int, Ended], None],
) -> None:
    """Draw all answers to their ends. `on_ended` is given each one's number and its tokens as soon as it ends."""
    if not answers:
        return
    length = max(len(one.ids) + len(one.uniforms) for one in answers)
    places = max(1, min(MAX_ROWS, len(answers), CACHE_BYTES // (length * reader.token_bytes)))
    # The longest first, so that those which are read together are alike; equal ones side by side.
    order = sorted(range(len(answers)), key=lambda i: (len(answers[i].ids), answers[i].ids), reverse=True)
    waiting, rows = deque(_Row(i, answers[i]) for i in order), list[_Row]()
    reader.open(places, length)
    try:
        while waiting or rows:
            if not rows or (places - len(rows)) * _REFILL >= places:
                _fill(reader, rows, waiting, places)
            for row in _step(reader, rows, temperature, eos_ids):
                on_ended(row.number, row.ended)
    finally:
        reader.close()


def _fill(reader: BatchReader, rows: list[_Row], waiting: deque[_Row], places: int) -> None:
    """Give free places to those that wait; answers to the same ids have these read once."""
    first = len(rows)
    rows += [waiting.popleft() for _ in range(min(places - first, len(waiting)))]
    new = groupby(range(first, len(rows)), key=lambda i: rows[i].begun.ids)
    reader.begin([(ids, tuple(same)) for ids, same in new])


def _step(reader: BatchReader, rows: list[_Row], temperature: float, eos_ids: tuple[int, ...]) -> list[_Row]:
    """One token more for each; returns those that have ended, whose places are free again."""
    logits_BV = reader.next([row.last for row in rows], [row.at for row in rows])
    uniform_B = torch.tensor([row.uniform for row in rows], dtype=torch.float64, device=logits_BV.device)
    ids_B, logps_B = draw(logits_BV, uniform_B, temperature)
    drawn = zip(rows, ids_B.tolist(), logps_B.tolist(), strict=True)
    over = [i for i, (row, token, logp) in enumerate(drawn) if row.add(token, logp, eos_ids)]
    return _leave(reader, rows, over) if over else []


def _leave(reader: BatchReader, rows: list[_Row], over: list[int]) -> list[_Row]:
    """Take these rows out; the last ones that go on move into their places, so that rows 0 to B-1 are in use."""
    ended = [rows[i] for i in over]
    left = len(rows) - len(over)
    pairs = list(zip(sorted(set(range(left, len(rows))) - set(over)), (i for i in over if i < left), strict=True))
    if pairs:
        reader.move(pairs, max(rows[source].at for source, _ in pairs))
    for source, target in pairs:
        rows[target] = rows[source]
    del rows[left:]
    return ended
