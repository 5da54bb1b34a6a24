"""The protocols of the parts: a rollout engine, an output head, anything that counts and is closed.

Teachers' scorers, weight transports and launchers have theirs in their own rooms (docs/design.md lists all seams).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from megatron_opd.core.named_weights import NamedWeights
from megatron_opd.core.types import Prompt, Rollout, Sampling

OnFinished: TypeAlias = Callable[[Rollout], None]
"""Receives each answer as soon as it is finished, from any thread."""


class Lost(RuntimeError):
    """The run lost something that it needs, its servers for instance: all ranks save what is trained, and stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnAsked:
    """A turn of an episode that is to be drawn."""

    prompt: Prompt
    """The episode's, as the data set has it; what is read is `ids`."""
    sample: int
    turn: int
    """Number of the turn in its episode, from 0."""
    ids: tuple[int, ...]
    """All tokens before."""
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnDrawn:
    """The tokens of a turn, each with its behaviour log-probability and the version of the weights."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    versions: tuple[int, ...]
    finish: str
    """"stop" or "length", as a rollout's."""


DrawTurn: TypeAlias = Callable[[TurnAsked], Awaitable[TurnDrawn]]
Talk: TypeAlias = Callable[[DrawTurn], Coroutine[Any, Any, list[Rollout]]]
"""Plays an episode, whose turns the given function draws; returns its trajectories."""


class Part(Protocol):
    """Something that works for the loop and may have things of its own running."""

    def metrics(self) -> dict[str, float]:
        """Counts since the last call, to be summed over replicas."""

    def close(self) -> None:
        """End what runs beside the caller; requests under way fail."""


class RolloutEngine(Part, Protocol):
    """Something that samples from the student's current weights. Leaders have one; other ranks have none."""

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        """All samples of all prompts, in order (prompt-major); never a short list. `on_finished` is told of each answer
        as soon as it is finished, from any thread. Raises Lost when nobody is left who could answer."""

    def converse(self, talks: Sequence[Talk], sampling: Sampling) -> list[list[Rollout]]:
        """Play episodes of several turns, all at once; what each of them returns, in order. Raises what `generate`
        raises, and what an episode raises."""

    def load(self, weights: NamedWeights, version: int) -> None:
        """Replace the weights; later rollouts carry `version`. Run `weights` to its end even where that fails: other
        ranks take part in it. For servers of all replicas there is nothing in it but on the first replica."""

    def release(self) -> None:
        """Give back GPU memory that the trainer needs, until the next `load`. Nobody samples meanwhile. Engines that
        hold no such memory do nothing."""
