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
    """Tensors of one type and device share a bucket, in order. Buckets that are filled at the same time, one a type,
    hold at most `max_bytes` together, or one larger tensor."""
    held: dict[tuple[torch.dtype, torch.device], list[tuple[str, torch.Tensor]]] = {}
    size = 0
    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        if held and size + num_bytes > max_bytes:
            yield from map(_pack, held.values())
            held, size = {}, 0
        held.setdefault((tensor.dtype, tensor.device), []).append((name, tensor.detach()))
        size += num_bytes
    yield from map(_pack, held.values())


def _pack(held: list[tuple[str, torch.Tensor]]) -> Bucket:
    kind = held[0][1].dtype  # FP8 knows no operations, not even this one: bytes
    flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in held]).view(kind)
    return Bucket([name for name, _ in held], [tensor.shape for _, tensor in held], flat)
