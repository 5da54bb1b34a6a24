"""The student's weights -> the engine. A collective: every rank takes part in gathering them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from megatron_opd.types import RolloutEngine


def sync(weights: Iterator[tuple[str, torch.Tensor]], engine: RolloutEngine | None, *, version: int) -> None:
    """Stream the student's export into this rank's engine; ranks without one only take part in the gathering."""
    if engine is None:
        deque(weights, maxlen=0)
    else:
        engine.load(weights, version)
