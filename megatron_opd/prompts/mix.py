"""Prompts: rows of files as token ids, mixed by weight in a fixed order, with a cursor that a checkpoint can hold."""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from megatron_opd.config import SourceConfig
from megatron_opd.core.environment import EnvironmentKind
from megatron_opd.core.types import Prompt
from megatron_opd.prompts.chat import Encoder, Messages, checked
from megatron_opd.prompts.files import Row, as_messages, at_path, read_rows
from megatron_opd.prompts.fingerprint import Fingerprinting
from megatron_opd.prompts.store import PackedPrompts
from megatron_opd.rewards.base import Reward

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedRow:
    """A row on its way to become a prompt of the student."""

    where: str
    """For messages: "prompts.jsonl, line 3"."""
    fields: Any
    prompt: Prompt
    messages: Messages | None
    """What it asks, where that is not a text; without the answer."""
    rendered: str
    """The text of `prompt.token_ids`."""
    reply: dict[str, Any] | None = None
    """The assistant's message that is the answer, whole; None where the answer is a text of its own."""


Complete = Callable[[Sequence[ParsedRow]], list[Prompt | None]]
"""Adds what else of its rows a run needs; None for a prompt to leave out."""


def read_prompts(
    source: SourceConfig,
    encoder: Encoder,
    *,
    limit: Limit,
    reward: Reward,
    is_graded: bool,
    complete: Complete | None = None,
    kind: EnvironmentKind | None = None,
) -> PackedPrompts:
    """All prompts of a source, in its order, with a progress bar on a terminal where that takes a while. `kind` is the
    environment that answers the policy there; None: nothing does.

    Raises ValueError naming the source's line or row for one that cannot be read or has no prompt, for malformed
    messages, for a prompt that is too long (unless `limit` drops it; an error when nothing is left), for a row without
    what the source's reward (`is_graded`) or its environment needs, and for what `complete` refuses.
    """
    prompts, told = PackedPrompts(source.name), Fingerprinting(source)
    checks = [*([reward.check] if is_graded else []), *([kind.check] if kind else [])]
    needs = _Needs(tuple(checks), _both(reward.fields, kind.fields if kind else ()))
    rows, seen = islice(read_rows(source), source.rows or None), 0
    with _progress(f"reading {source.name}") as show:
        while batch := list(islice(rows, _BATCH)):
            asked = _asked(batch, source, encoder, needs)
            fitting = _fitting(asked, encoder, limit)
            completed = complete(fitting) if complete else [one.prompt for one in fitting]
            ready = [prompt for prompt in completed if prompt is not None]
            for prompt in ready:
                prompts.append(prompt)
            told.rows(row.fields for row in batch)
            told.prompts(ready)
            prompts.dropped = seen + len(batch) - len(prompts)
            seen += len(batch)
            show(batch[-1].share)
    if prompts.dropped and not prompts:
        raise ValueError(
            f"prompt source '{source.name}': all {prompts.dropped} prompts of {source.path} are longer than"
            f" {limit.tokens} tokens ({limit.why})"
        )
    if not prompts:
        raise ValueError(f"prompt source '{source.name}': {source.path} has no prompts")
    prompts.fingerprint = told.done()
    return prompts


@dataclass(frozen=True, slots=True)
class _Needs:
    """The demands on a row besides a prompt."""

    checks: tuple[Callable[[Prompt], None], ...]
    """Each raises ValueError saying what the row lacks."""
    fields: tuple[str, ...] | None
    """Fields that are kept; None: all of them."""


def _both(some: tuple[str, ...] | None, others: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Fields of a row that one or the other wants; None: all of them."""
    return None if some is None or others is None else (*some, *others)


def _asked(rows: list[Row], source: SourceConfig, encoder: Encoder, needs: _Needs) -> list[ParsedRow]:
    """The rows, checked; their prompts without token ids."""
    asked = []
    for row in rows:
        try:
            text, answer, messages, reply = _parse(row.fields, source)
            rendered = encoder.render(messages or text)
            rendered.encode()  # half a surrogate pair is no text
            extra = _extra(row.fields, source, needs.fields)
            more = {"answer": answer, "extra": extra, "messages": encoder.kept(messages or text)}
            prompt = Prompt(source=source.name, index=row.index, text=text, token_ids=(), **more)
            for check in needs.checks:
                check(prompt)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None
        told = {"where": row.where, "fields": row.fields, "rendered": rendered}
        asked.append(ParsedRow(prompt=prompt, messages=messages, reply=reply, **told))
    return asked


def _fitting(asked: list[ParsedRow], encoder: Encoder, limit: Limit) -> list[ParsedRow]:
    """Those within the limit, with token ids. Raises ValueError for another one, unless they are to be dropped."""
    fitting = []
    for one, ids in zip(asked, encoder.encode([one.rendered for one in asked]), strict=True):
        if len(ids) <= limit.tokens:
            prompt = dataclasses.replace(one.prompt, token_ids=tuple(ids))
            fitting.append(dataclasses.replace(one, prompt=prompt))
        elif not limit.drop:
            raise ValueError(
                f"{one.where}: the prompt has {len(ids)} tokens, and data.on_too_long is error; the limit is"
                f" {limit.tokens} ({limit.why})"
            )
    return fitting


def _parse(fields: Any, source: SourceConfig) -> tuple[str, str | None, Messages | None, dict[str, Any] | None]:
    """(text, answer, the messages if the prompt is some, the message that is the answer) of a row."""
    asked = at_path(fields, source.prompt_field)
    if asked is None:
        asked = at_path(fields, "messages")
    messages, reply, answer = None, None, at_path(fields, source.answer_field)
    asked = as_messages(asked)
    if isinstance(asked, list):
        messages = checked(asked)
        if messages[-1]["role"] == "assistant":
            last = messages.pop()
            if answer is None:
                reply, answer = last, last["content"]
        if not messages:
            raise ValueError("there is no message before the assistant's")
        asked = messages[-1]["content"]
    if not isinstance(asked, str):
        raise ValueError(f'expected an object with a text field "{source.prompt_field}", or a list of messages in it')
    if not asked.strip():
        raise ValueError("the prompt is empty")
    return asked, answer if isinstance(answer, str) else None, messages, reply


def _extra(fields: Any, source: SourceConfig, wanted: tuple[str, ...] | None) -> dict[str, Any]:
    """The fields of a row that its reward and its environment want besides prompt and answer; None: all others."""
    own = (source.prompt_field, source.answer_field, "messages")
    return {name: x for name, x in fields.items() if name not in own and (wanted is None or name in wanted)}


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
        """The next `count` prompts of the stream; those that are among them once more say so."""
        drawn = [self._draw(self._most_behind()) for _ in range(count)]
        seen: Counter[tuple[str, int]] = Counter()
        for i, prompt in enumerate(drawn):
            row = prompt.source, prompt.index
            if seen[row]:
                drawn[i] = dataclasses.replace(prompt, repeat=seen[row])
            seen[row] += 1
        return drawn

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
