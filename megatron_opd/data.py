"""Prompts: read from JSON Lines, mixed by weight in a fixed order, with a cursor that a checkpoint can hold."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_opd.config import SourceConfig
from megatron_opd.rewards.base import Reward
from megatron_opd.tokenizer import Tokenizer
from megatron_opd.types import Prompt


def read_prompts(
    source: SourceConfig, tokenizer: Tokenizer, *, limit: tuple[int, str], reward: Reward, is_graded: bool
) -> list[Prompt]:
    """All prompts of a file, in its order; blank lines are skipped.

    `limit` is the largest number of tokens and what sets it. Raises ValueError naming the file and line for broken
    JSON, a missing, empty or too long prompt, and (`is_graded`) for a row without what the source's reward needs.
    """
    path = Path(source.path)
    if not path.is_file():
        raise ValueError(f"prompt source '{source.name}': there is no file {path}")
    prompts = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                prompt = _parse(line.decode("utf-8"), number - 1, source.name, tokenizer, limit, reward.fields)
                if is_graded:
                    reward.check(prompt)
                prompts.append(prompt)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not prompts:
        raise ValueError(f"prompt source '{source.name}': {path} has no prompts")
    return prompts


def _parse(
    line: str, index: int, source: str, tokenizer: Tokenizer, limit: tuple[int, str], fields: tuple[str, ...] | None
) -> Prompt:
    """`fields` are those to keep besides prompt and answer; None: all."""
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError('expected an object with a text field "prompt"')
    if not text.strip():
        raise ValueError("the prompt is empty")
    ids = tokenizer.encode(text)
    if len(ids) > limit[0]:
        raise ValueError(f"the prompt has {len(ids)} tokens; the limit is {limit[0]} ({limit[1]})")
    others = (name for name in row if name not in ("prompt", "answer"))
    extra = {name: row[name] for name in others if fields is None or name in fields}
    return Prompt(source=source, index=index, text=text, token_ids=tuple(ids), answer=row.get("answer"), extra=extra)


class PromptMix:
    """An endless, repeatable stream of prompts from several sources.

    Sources alternate so that their counts follow their weights as closely as whole prompts can, at every point of the
    stream; within a source every epoch is a new permutation. The state is how many prompts each source has given.
    """

    def __init__(self, sources: Sequence[tuple[SourceConfig, list[Prompt]]], *, seed: int) -> None:
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
