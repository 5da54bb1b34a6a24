"""The protocol of a backend: it says what it supports, and makes passes over rows of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_opd.loss.fused.passes import Known, PassInputs
from megatron_opd.loss.fused.statistics import LogitRows, LossSpec
from megatron_opd.loss.fused.token_results import TokenResults


@dataclass(frozen=True, slots=True)
class Wanted:
    """The loss to compute, and the tensors to compute it on."""

    spec: LossSpec
    device: str
    """Its type: cpu, cuda."""
    dtypes: frozenset[torch.dtype]
    """Types of all models' hidden states or logits."""


class RowsPass(Protocol):
    """One pass over rows: `start`, `middle`, `finish`, in this order, on every shard; other work may lie between."""

    rows: LogitRows

    def start(self) -> None:
        """Look at the rows; send what other shards need."""

    def middle(self) -> None:
        """Receive that, and send what needs it. Once, however often it is called."""

    def finish(self) -> TokenResults:
        """The results, with the gradient in place of the student's logits where one is wanted."""

    def known(self) -> Known | None:
        """Findings that spare another pass over the same rows some work; None: there are none."""


class Backend(Protocol):
    """Computes losses and gradients of rows."""

    name: str

    @staticmethod
    def supports(wanted: Wanted) -> bool:
        """Whether it can compute this; what no fused backend supports runs on `readable.py`."""

    def begin(self, inputs: PassInputs) -> RowsPass:
        """A pass, not yet started."""

    def scale(self, grad_TL: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """`grad_TL` times a number, or one a row, in place."""
