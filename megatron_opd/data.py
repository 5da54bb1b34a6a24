"""Prompts: rows of files as token ids, mixed by weight in a fixed order, with a cursor that a checkpoint can hold."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from megatron_opd.chat import Encoder, Messages, checked
from megatron_opd.config import SourceConfig
from megatron_opd.packed import PackedPrompts
from megatron_opd.rewards.base import Reward
from megatron_opd.rows import Row, read_rows
from megatron_opd.types import Prompt

_BATCH = 1024
"""Rows that are tokenized together, and that are Python objects at a time."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The largest number of tokens of a prompt."""

    tokens: int
    why: str
    """What sets it."""
    drop: bool = False
    """Leave longer prompts out, instead of an error."""


def read_prompts(
    source: SourceConfig, encoder: Encoder, *, limit: Limit, reward: Reward, is_graded: bool
) -> PackedPrompts:
    """All prompts of a source, in its order, with a progress bar on a terminal where that takes a while.

    Raises ValueError naming the source's line or row for one that cannot be read or has no prompt, for malformed
    messages, for a prompt that is too long (unless `limit` drops it; an error when nothing is left), and
    (`is_graded`) for a row without what the source's reward needs.
    """
    prompts = PackedPrompts(source.name)
    rows = read_rows(source)
    with _progress(f"reading {source.name}") as show:
        while batch := list(islice(rows, _BATCH)):
            _add(batch, prompts, source, encoder, limit, reward, is_graded)
            show(batch[-1].share)
    if prompts.dropped and not prompts:
        raise ValueError(
            f"prompt source '{source.name}': all {prompts.dropped} prompts of {source.path} are longer than"
            f" {limit.tokens} tokens ({limit.why})"
        )
    if not prompts:
        raise ValueError(f"prompt source '{source.name}': {source.path} has no prompts")
    return prompts


def _add(
    rows: list[Row],
    prompts: PackedPrompts,
    source: SourceConfig,
    encoder: Encoder,
    limit: Limit,
    reward: Reward,
    is_graded: bool,
) -> None:
    asked = []
    for row in rows:
        try:
            text, answer, messages = _parse(row.fields, source)
            rendered = encoder.render(messages or text)
            rendered.encode()  # half a surrogate pair is no text
            extra = _extra(row.fields, source, reward.fields)
            prompt = Prompt(source=source.name, index=row.index, text=text, token_ids=(), answer=answer, extra=extra)
            if is_graded:
                reward.check(prompt)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None
        asked.append((prompt, rendered))
    all_ids = encoder.encode([rendered for _, rendered in asked])
    for row, (prompt, _), ids in zip(rows, asked, all_ids, strict=True):
        if len(ids) <= limit.tokens:
            prompts.append(dataclasses.replace(prompt, token_ids=tuple(ids)))
        elif limit.drop:
            prompts.dropped += 1
        else:
            raise ValueError(
                f"{row.where}: the prompt has {len(ids)} tokens, and data.on_too_long is error; the limit is"
                f" {limit.tokens} ({limit.why})"
            )


def _parse(fields: Any, source: SourceConfig) -> tuple[str, str | None, Messages | None]:
    """(text, answer, the messages if the prompt is some) of a row."""
    asked = _field(fields, source.prompt_field)
    if asked is None:
        asked = _field(fields, "messages")
    messages, answer = None, _field(fields, source.answer_field)
    if isinstance(asked, list):
        messages = checked(asked)
        if messages[-1]["role"] == "assistant":
            reference = messages.pop()["content"]
            answer = reference if answer is None else answer
        if not messages:
            raise ValueError("there is no message before the assistant's")
        asked = messages[-1]["content"]
    if not isinstance(asked, str):
        raise ValueError(f'expected an object with a text field "{source.prompt_field}", or a list of messages in it')
    if not asked.strip():
        raise ValueError("the prompt is empty")
    return asked, answer if isinstance(answer, str) else None, messages


def _extra(fields: Any, source: SourceConfig, wanted: tuple[str, ...] | None) -> dict[str, Any]:
    """The fields of a row that its reward wants besides prompt and answer; None: all others."""
    own = (source.prompt_field, source.answer_field, "messages")
    return {name: x for name, x in fields.items() if name not in own and (wanted is None or name in wanted)}


def _field(fields: Any, name: str) -> Any:
    """What a row has under a name, or under a path of names with dots; None if nothing."""
    if not isinstance(fields, Mapping):
        return None
    if name in fields or "." not in name:
        return fields.get(name)
    first, _, rest = name.partition(".")
    return _field(fields.get(first), rest)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[float], None]]:
    """A function to be told the share that is done; it shows itself on a terminal, and once there is more to come."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_interactive)
    task = bar.add_task(what, total=1.0)

    def show(share: float) -> None:
        if share < 1:
            bar.start()
        bar.update(task, completed=share)

    try:
        yield show
    finally:
        bar.stop()


class PromptMix:
    """An endless, repeatable stream of prompts from several sources.

    Sources alternate so that their counts follow their weights as closely as whole prompts can, at every point of the
    stream; within a source every epoch is a new permutation. The state is how many prompts each source has given.
    """

    def __init__(self, sources: Sequence[tuple[SourceConfig, Sequence[Prompt]]], *, seed: int) -> None:
        self.sources = list(sources)
        self.seed = seed
        self.given = [0] * len(self.sources)
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts of the stream."""
        return [self._draw(self._most_behind()) for _ in range(count)]

    def state(self) -> dict[str, int]:
        """How many prompts each source has given, by name."""
        return {source.name: given for (source, _), given in zip(self.sources, self.given, strict=True)}

    def load_state(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken. A source that is new since then starts at its beginning."""
        self.given = [state.get(source.name, 0) for source, _ in self.sources]

    def _most_behind(self) -> int:
        total_weight = sum(source.weight for source, _ in self.sources)
        total_given = sum(self.given) + 1

        def deficit(i: int) -> float:
            return total_given * self.sources[i][0].weight / total_weight - self.given[i]

        return max(range(len(self.sources)), key=lambda i: (deficit(i), -i))

    def _draw(self, i: int) -> Prompt:
        prompts = self.sources[i][1]
        epoch, position = divmod(self.given[i], len(prompts))
        self.given[i] += 1
        return prompts[self._order(i, epoch)[position]]

    def _order(self, i: int, epoch: int) -> list[int]:
        cached = self._orders.get(i)
        if cached is None or cached[0] != epoch:
            name = self.sources[i][0].name
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}/{epoch}".encode()))
            cached = self._orders[i] = (epoch, torch.randperm(len(self.sources[i][1]), generator=generator).tolist())
        return cached[1]
