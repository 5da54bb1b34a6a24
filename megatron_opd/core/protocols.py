"""What parts expect of each other: a rollout engine, an output head, anything that counts and is closed.

Teachers' scorers, weight transports and launchers have theirs in their own rooms (docs/design.md lists all seams).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch

from megatron_opd.core.named_weights import NamedWeights
from megatron_opd.core.types import Prompt, Rollout, Sampling

OnFinished: TypeAlias = Callable[[Rollout], None]
"""Receives each answer as soon as it is finished, from any thread."""


class Lost(RuntimeError):
    """What the run needs is gone for good, for instance its servers: all ranks save what is trained, and stop."""


class Part(Protocol):
    """Something that works for the loop and may have things of its own running."""

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, to be summed over replicas."""

    def close(self) -> None:
        """End what runs beside the caller; requests under way fail."""


class RolloutEngine(Part, Protocol):
    """Something that samples from the student's current weights. Leaders have one; other ranks have none."""

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        """All samples of all prompts, in order (prompt-major); never a short list. `on_finished` is told of each answer
        as soon as it is finished, from any thread. Raises Lost when nobody is left who could answer."""

    def load(self, weights: NamedWeights, version: int) -> None:
        """Replace the weights; later rollouts carry `version`. Run `weights` to its end even where that fails: other
        ranks take part in it."""

    def release(self) -> None:
        """Give back GPU memory that the trainer needs, until the next `load`. Nobody samples meanwhile. Engines that
        hold no such memory do nothing."""


class OwnHead(Protocol):
    """A teacher's output head that makes its product itself, because that is not the plain one of two tensors.

    Shape letters: C tokens, L rows (columns of the logits), D hidden size.
    """

    shape: torch.Size
    """[L, D]."""
    dtype: torch.dtype
    """Of hidden states and logits."""
    device: torch.device

    def logits(self, hidden_CD: torch.Tensor, out_CL: torch.Tensor | None = None) -> torch.Tensor:
        """h Wᵀ without a gradient, [C, L], where there is an `out_CL` into that."""

    def is_finite(self) -> bool:
        """Whether all of its numbers are."""


Head: TypeAlias = torch.Tensor | OwnHead
"""Rows of an output head, [L, D]."""
