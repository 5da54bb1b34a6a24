"""Reading many sequences of different lengths at once with a transformers model, a token each at a time.

Each sequence has a row of a cache whose memory is taken once, and its own place in that row: its keys begin at 0
whatever the others' lengths, and a mask hides what lies behind its last token. So nothing is padded on the left, rows
can leave and others take their place, and what a row holds does not depend on its company.

Shape suffixes: B rows in use, S positions of a prompt, K positions in use, L positions of a row, H heads of keys and
values, D their size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

BEGIN_TOKENS = 4096
"""Tokens of prompts, padding included, that one forward pass takes: a bound for the memory of its activations."""
_ENOUGH_TOKENS, _ALIKE = 512, 0.9
"""A forward pass of so many tokens keeps a processor busy: it takes no prompt that is shorter than this share of it."""

Given = tuple[tuple[int, ...], Sequence[int]]
"""The ids of a prompt, and the rows that it is for."""


class BatchReader(Protocol):
    """Says what follows each of its sequences. Rows 0 to B-1 are in use; all methods run without gradients."""

    @property
    def token_bytes(self) -> int:
        """Memory that a position of a row takes."""

    def open(self, rows: int, length: int) -> None:
        """Take memory for so many rows of so many positions."""

    def begin(self, prompts: Sequence[Given]) -> None:
        """Read all but the last token of each prompt, once, into all of its rows."""

    def next(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Read a token a row, which stands at that position. Returns the logits of the one after it, float32 [B, V]."""

    def move(self, pairs: Sequence[tuple[int, int]], length: int) -> None:
        """Put the first positions of rows into other ones: (from, to), no row in two pairs."""

    def close(self) -> None:
        """Give the memory back."""


class ModelReader:
    """A BatchReader over a causal language model of transformers, run by its own forward pass."""

    def __init__(self, model: Any, *, vocab_size: int) -> None:
        """Raises ValueError for a model that keeps something else than the keys and values of all positions."""
        check_cache(model.config)
        self.model, self.vocab_size = model, vocab_size
        self._layers: list[_Layer] = []
        self._now = _Now()

    @property
    def token_bytes(self) -> int:
        """Memory that a position of a row takes."""
        layers, heads, size = _shape(self.model.config)
        return 2 * layers * heads * size * self.model.dtype.itemsize

    def open(self, rows: int, length: int) -> None:
        """Take memory for so many rows of so many positions."""
        layers, heads, size = _shape(self.model.config)
        like = {"dtype": self.model.dtype, "device": self.model.device}
        # Zeros, not what was there: the products of a masked position's values are 0 times those, and NaN stays NaN.
        made = [[torch.zeros(rows, heads, length, size, **like) for _ in range(2)] for _ in range(layers)]
        self._layers = [_Layer(keys, values, self._now) for keys, values in made]

    def begin(self, prompts: Sequence[Given]) -> None:
        """Read all but the last token of each prompt, once, into all of its rows."""
        from transformers import DynamicCache

        longest_first = sorted(((ids[:-1], rows) for ids, rows in prompts if len(ids) > 1), key=lambda p: -len(p[0]))
        for part in _parts(longest_first):
            ids_BS = torch.zeros(len(part), len(part[0][0]), dtype=torch.int64)
            for row_S, (ids, _) in zip(ids_BS, part, strict=True):
                row_S[: len(ids)] = torch.tensor(ids)
            cache = DynamicCache()
            # Padding stands behind the tokens, so no token sees it, and the model needs no mask but its own.
            self.model.base_model(input_ids=ids_BS.to(self.model.device), past_key_values=cache, use_cache=True)
            for layer, read in zip(self._layers, cache.layers, strict=True):
                layer.fill(read.keys, read.values, part)

    def next(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Read a token a row; returns the logits of the one after it, float32 [B, V]."""
        from transformers import Cache

        device = self.model.device
        at_B = torch.tensor(positions, device=device)
        self._now.rows_B, self._now.at_B = torch.arange(len(ids), device=device), at_B
        self._now.used = max(positions) + 1
        seen_B11K = (torch.arange(self._now.used, device=device) <= at_B[:, None])[:, None, None, :]
        out = self.model(
            input_ids=torch.tensor(ids, device=device)[:, None],
            attention_mask=seen_B11K,
            position_ids=at_B[:, None],
            past_key_values=Cache(layers=self._layers),
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1, : self.vocab_size].float()

    def move(self, pairs: Sequence[tuple[int, int]], length: int) -> None:
        """Put the first positions of rows into other ones: (from, to), no row in two pairs."""
        sources, targets = (list(rows) for rows in zip(*pairs, strict=True))
        for layer in self._layers:
            for tensor in (layer.keys, layer.values):
                tensor[targets, :, :length] = tensor[sources, :, :length]

    def close(self) -> None:
        """Give the memory back."""
        self._layers = []


class MixtureReader:
    """A BatchReader of the mixture (1 - alpha) q + alpha p of two others' tempered distributions."""

    def __init__(self, student: BatchReader, teacher: BatchReader, *, alpha: float, temperature: float) -> None:
        self._both = (student, teacher)
        self._log_weights = math.log1p(-alpha), math.log(alpha)
        self._temperature = temperature or 1.0

    @property
    def token_bytes(self) -> int:
        """Memory that a position of a row takes, in both."""
        return sum(one.token_bytes for one in self._both)

    def open(self, rows: int, length: int) -> None:
        """Take memory for so many rows of so many positions."""
        for one in self._both:
            one.open(rows, length)

    def begin(self, prompts: Sequence[Given]) -> None:
        """Read all but the last token of each prompt, once, into all of its rows."""
        for one in self._both:
            one.begin(prompts)

    def next(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Logits [B, V] such that the softmax of logits / temperature is the mixture."""
        logits = [one.next(ids, positions) for one in self._both]
        student_BV, teacher_BV = [torch.log_softmax(one_BV / self._temperature, dim=-1) for one_BV in logits]
        of_student, of_teacher = self._log_weights
        return torch.logaddexp(student_BV + of_student, teacher_BV + of_teacher) * self._temperature

    def move(self, pairs: Sequence[tuple[int, int]], length: int) -> None:
        """Put the first positions of rows into other ones: (from, to), no row in two pairs."""
        for one in self._both:
            one.move(pairs, length)

    def close(self) -> None:
        """Give the memory back."""
        for one in self._both:
            one.close()


@dataclass(slots=True)
class _Now:
    """The places of the rows' next tokens, for all layers."""

    rows_B: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    at_B: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    used: int = 0
    """K."""


class _Layer:
    """A layer of the cache, as transformers' `Cache` wants it: `update` takes a token a row and returns all so far."""

    def __init__(self, keys_BHLD: torch.Tensor, values_BHLD: torch.Tensor, now: _Now) -> None:
        self.keys, self.values, self._now = keys_BHLD, values_BHLD, now

    def update(
        self, keys_BH1D: torch.Tensor, values_BH1D: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values [B, H, K, D] up to this token, of which a mask hides what is behind each row's end."""
        now, count = self._now, len(keys_BH1D)
        self.keys[now.rows_B, :, now.at_B] = keys_BH1D[:, :, 0]
        self.values[now.rows_B, :, now.at_B] = values_BH1D[:, :, 0]
        return self.keys[:count, :, : now.used], self.values[:count, :, : now.used]

    def get_seq_length(self, *_: Any) -> int:
        """Older versions of transformers ask for it. Nothing depends on it: positions and mask are given."""
        return 0

    def fill(
        self,
        keys_BHSD: torch.Tensor,
        values_BHSD: torch.Tensor,
        prompts: Sequence[Given],
    ) -> None:
        """Copy each prompt's keys and values into its rows; its padding comes along, and no mask lets it be seen."""
        rows = [row for _, same in prompts for row in same]
        sources = [i for i, (_, same) in enumerate(prompts) for _ in same]
        length = keys_BHSD.shape[2]
        self.keys[rows, :, :length] = keys_BHSD[sources]
        self.values[rows, :, :length] = values_BHSD[sources]


def check_cache(config: Any) -> None:
    """Raises ValueError for a model that keeps something else than the keys and values of all positions."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or config._attn_implementation != "sdpa":
        raise ValueError(
            f"the embedded engine has no cache for a model of type {config.model_type} with {', '.join(sorted(kinds))}"
            f" by {config._attn_implementation}: sample it by a server (rollout.engine: sglang)"
        )


def _shape(config: Any) -> tuple[int, int, int]:
    """(layers, heads of keys and values, their size)."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, size


def _parts(prompts: list[Given]) -> list[list[Given]]:
    """Prompts, the longest first, in lists for one forward pass each."""
    parts: list[list[Given]] = []
    for prompt in prompts:
        if not parts or _is_full(parts[-1], len(prompt[0])):
            parts.append([])
        parts[-1].append(prompt)
    return parts


def _is_full(part: list[Given], length: int) -> bool:
    """Whether a prompt of so many tokens is better read in a forward pass of its own."""
    longest = len(part[0][0])
    has_enough = len(part) * longest >= _ENOUGH_TOKENS
    return (len(part) + 1) * longest > BEGIN_TOKENS or (has_enough and length < _ALIKE * longest)
