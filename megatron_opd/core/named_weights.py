"""Weights on their way from the student to whoever samples or stores them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TypeAlias

import torch

NamedWeights: TypeAlias = Iterator[tuple[str, torch.Tensor]]
"""(Hugging Face name, full tensor) pairs. Each step may be a collective, so every rank runs it to its end."""


def drain(weights: NamedWeights) -> None:
    """Take part in gathering weights that another rank uses."""
    deque(weights, maxlen=0)
