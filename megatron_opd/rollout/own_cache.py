"""Reading for models that keep something else than the keys and values of all positions: windows, states, nothing.

They run by their own forward pass with the cache that they make themselves, so whatever transformers computes is what
is sampled. Such caches have no places of their own for rows. Answers to the same ids are equally long as long as they
live, so these share a cache without padding, and other answers have another one.

Shape suffixes: N answers that share a cache, S their tokens so far, B rows in use, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_opd.rollout.reading import Given

_CACHES = ("past_key_values", "cache_params")
"""Names that a cache has among the arguments of a forward pass."""
_SAME = {torch.float32: 1e-3}
"""The largest difference of log-probabilities, in nats, between a step with a cache and a whole pass; for other types,
which round more, _ALIKE."""
_ALIKE = 0.2


class OwnCacheReader:
    """A BatchReader over any causal language model of transformers; one forward pass a distinct prompt and token."""

    def __init__(self, model: Any, *, vocab_size: int) -> None:
        self.model, self.vocab_size = model, vocab_size
        takes = inspect.signature(model.forward).parameters
        self._cache = next((name for name in _CACHES if name in takes), "")
        self._always: dict[str, Any] = {"use_cache": True} if self._cache else {}
        self._always |= {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._rows: list[_Place] = []
        if self._cache and not self._shares():
            self._cache, self._always = "", {**self._always, "use_cache": False}

    @property
    def token_bytes(self) -> int:
        """Memory that a position of a row takes at most: a state or a window takes less than all positions."""
        text = self.model.config.get_text_config()
        heads = getattr(text, "num_attention_heads", 0) * _head_size(text)
        return 2 * int(text.num_hidden_layers * max(heads, text.hidden_size)) * self.model.dtype.itemsize

    def open(self, rows: int, length: int) -> None:
        """Nothing is taken before it is needed; `length` has no meaning here."""
        self._rows = [_FREE] * rows

    def begin(self, prompts: Sequence[Given]) -> None:
        """Read all but the last token of each prompt, once, for all of its rows."""
        for ids, rows in prompts:
            shared = _Shared(torch.tensor([ids[:-1]], dtype=torch.int64, device=self.model.device))
            if len(ids) > 1 and self._cache:
                self._read(shared, shared.ids_NS)
            shared.keep([0] * len(rows))
            for i, row in enumerate(rows):
                self._rows[row] = _Place(shared, i)

    def next(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Read a token a row; returns the logits of the one after it, float32 [B, V]."""
        self._rows[len(ids) :] = [_FREE] * (len(self._rows) - len(ids))  # what ended there is not to keep a cache alive
        of: dict[int, list[int]] = {}
        for row in range(len(ids)):
            of.setdefault(id(self._rows[row].shared), []).append(row)
        found: list[torch.Tensor] = []
        for rows in of.values():
            shared = self._rows[rows[0]].shared
            shared.keep([self._rows[row].at for row in rows])  # the others have ended
            for i, row in enumerate(rows):
                self._rows[row] = _Place(shared, i)
            new_N1 = torch.tensor([[ids[row]] for row in rows], device=self.model.device)
            shared.ids_NS = torch.cat([shared.ids_NS, new_N1], dim=1)
            found.append(self._read(shared, new_N1 if self._cache else shared.ids_NS))
        order = torch.tensor([row for rows in of.values() for row in rows], device=self.model.device)
        return torch.cat(found)[order.argsort()]

    def move(self, pairs: Sequence[tuple[int, int]], length: int) -> None:
        """Give rows' answers other rows: (from, to), no row in two pairs."""
        for source, target in pairs:
            self._rows[target] = self._rows[source]

    def close(self) -> None:
        """Give the memory back."""
        self._rows = []

    @torch.no_grad()
    def _shares(self) -> bool:
        """Whether answers may share the model's cache: a step with it, of several answers, says what whole passes say.

        Some models of transformers make caches that cannot be reordered, or compute a step in another way.
        """
        ids_12 = torch.tensor([[0, 1]], device=self.model.device) % self.vocab_size
        new_31 = torch.tensor([[0], [1], [2]], device=self.model.device) % self.vocab_size
        shared = _Shared(ids_12)
        try:
            self._read(shared, ids_12)
            shared.keep([0] * len(new_31))
            stepped_3V = self._read(shared, new_31)
            whole_3V = self._read(_Shared(ids_12), torch.cat([ids_12.expand(len(new_31), -1), new_31], dim=1))
        except Exception:  # whatever a model raises that has another kind of cache
            return False
        gap = (stepped_3V.log_softmax(-1) - whole_3V.log_softmax(-1)).abs().max()
        return bool(gap <= _SAME.get(self.model.dtype, _ALIKE))

    def _read(self, shared: _Shared, ids_NS: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] behind the last of these tokens, which follow those in the cache."""
        cache = {self._cache: shared.cache} if shared.cache is not None else {}
        out = self.model(input_ids=ids_NS, **cache, **self._always)
        shared.cache = getattr(out, self._cache) if self._cache else None
        return out.logits[:, -1, : self.vocab_size].float()


@dataclass(slots=True)
class _Shared:
    """Answers that began with the same ids."""

    ids_NS: torch.Tensor
    cache: Any = None
    """As the model made it; None before the first token, and always for a model without one."""

    def keep(self, places: list[int]) -> None:
        """Only these, in this order; one may be there several times."""
        if places == list(range(len(self.ids_NS))):
            return
        at = torch.tensor(places, device=self.ids_NS.device)
        self.ids_NS = self.ids_NS[at]
        if self.cache is not None:
            self.cache.reorder_cache(at)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a row's answer is."""

    shared: _Shared
    at: int


_FREE = _Place(_Shared(torch.empty(1, 0, dtype=torch.int64)), 0)


def _head_size(config: Any) -> int:
    """0 where the config does not say it for all layers."""
    try:
        return config.head_dim or 0
    except (AttributeError, RuntimeError):  # transformers raises the latter where layers differ
        return 0
