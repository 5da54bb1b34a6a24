"""The doors between the parts: a rollout engine, a teacher's scorer, an output head, and the streams between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

import torch

from megatron_opd.core.types import Prompt, Rollout, Sampling, TeacherScore

OnFinished: TypeAlias = Callable[[Rollout], None]
"""Receives each answer as soon as it is finished, from any thread."""
NamedWeights: TypeAlias = Iterator[tuple[str, torch.Tensor]]
"""(Hugging Face name, full tensor) pairs."""


class RolloutEngine(Protocol):
    """Something that samples from the student's current weights."""

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        """All samples of all prompts, in order (prompt-major); never a short list. `on_finished` is told of each answer
        as soon as it is finished, from any thread."""

    def load(self, weights: NamedWeights, version: int) -> None:
        """Replace the weights by (Hugging Face name, full tensor) pairs; later rollouts carry `version`."""

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, to be summed over replicas."""

    def close(self) -> None:
        """End what runs beside the caller; requests under way fail."""


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


class TeacherScorer(Protocol):
    """Something that tells a teacher's distribution at every response token of a rollout."""

    name: str
    head_LD: Head | None
    """This rank's rows of the output head, where scores are hidden states and the loss is computed here; else None."""

    def submit(self, rollout: Rollout) -> None:
        """Start scoring a rollout that `score` will be asked about; on leaders, from any thread. May do nothing."""

    def score(self, rollouts: list[Rollout]) -> list[TeacherScore]:
        """One score a rollout, in order. Collective over the ranks of a replica."""

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, to be summed over replicas."""

    def close(self) -> None:
        """End what runs beside the caller."""
