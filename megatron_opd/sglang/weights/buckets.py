"""A stream of named tensors as buckets of bounded size: what is sent at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

MAX_BYTES = 256 << 20
"""Weights sent at a time; bounds the memory that a sync takes on either side."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors of one type, one after the other in one flat copy."""

    names: list[str]
    shapes: list[torch.Size]
    flat: torch.Tensor
    """1-D, of the tensors' own type."""

    @property
    def dtype(self) -> str:
        """As the servers want it: `bfloat16`."""
        return str(self.flat.dtype).removeprefix("torch.")

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors, as views of `flat`."""
        pieces = self.flat.split([shape.numel() for shape in self.shapes])
        return [(n, p.view(s)) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)]


def buckets(weights: Iterable[tuple[str, torch.Tensor]], max_bytes: int = MAX_BYTES) -> Iterator[Bucket]:
    """In order. A bucket holds at most `max_bytes`, or one larger tensor, and tensors of one type and device."""
    held: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        is_other = bool(held) and (tensor.dtype, tensor.device) != (held[0][1].dtype, held[0][1].device)
        if held and (is_other or size + num_bytes > max_bytes):
            yield _pack(held)
            held, size = [], 0
        held.append((name, tensor.detach()))
        size += num_bytes
    if held:
        yield _pack(held)


def _pack(held: list[tuple[str, torch.Tensor]]) -> Bucket:
    flat = torch.cat([tensor.reshape(-1) for _, tensor in held])
    return Bucket([name for name, _ in held], [tensor.shape for _, tensor in held], flat)
