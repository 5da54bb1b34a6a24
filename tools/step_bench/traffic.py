"""Counts what a rank gives to collectives and sends to its neighbours, whoever calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_INPUT = {
    "_allgather_base_": 1,
    "_reduce_scatter_base_": 1,
    "allgather_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "alltoall_": 1,
    "alltoall_base_": 1,
    "gather_": 1,
    "reduce_scatter_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "scatter_": 1,
}
"""Which argument of an operation is what this rank gives; of the others it is the first."""
_NOTHING = {"barrier", "monitored_barrier_", "recv_", "recv_any_source_"}


class Traffic(TorchDispatchMode):
    """Bytes by operation while it is entered: the payload, which a ring sends up to twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            if name not in _NOTHING:
                given = args[_INPUT.get(name, 0)]
                self.bytes[name.strip("_")] += sum(t.numel() * t.element_size() for t in _tensors(given))
        return func(*args, **(kwargs or {}))


def _tensors(nested: Any) -> Iterator[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        yield nested
    elif isinstance(nested, list | tuple):
        for one in nested:
            yield from _tensors(one)
