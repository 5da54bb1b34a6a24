"""The rollout engines that a config can name, and what settings and planner must know of each.

The engines themselves are in `rollout/`, which builds the one of a run (`rollout/engines.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EngineName = Literal["local", "sglang"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineTraits:
    """An engine's needs and abilities."""

    is_served: bool = False
    """Whether it samples from the servers of `rollout.servers`, which are started before the ranks."""
    shares_gpus: bool = False
    """Whether it always computes on the trainer's GPUs and must give their memory back while the student trains. One
    that is served does so where `rollout.servers.colocated` says it."""
    mixes: bool = False
    """Whether it can sample from a mixture of student and teacher (`answers.teacher_mixed_alpha`)."""
    takes: tuple[str, ...] = ()
    """Settings of `rollout` that only some engines have a use for, and this one does."""


ENGINES: dict[str, EngineTraits] = {
    "local": EngineTraits(mixes=True, takes=("dtype",)),
    "sglang": EngineTraits(
        is_served=True, takes=("top_p", "top_k", "max_staleness", "partial", "quantization", "sync_verify", "servers")
    ),
}


def engines_that_take(setting: str) -> str:
    """The names of the engines with a use for a setting of `rollout`, for messages."""
    return " or ".join(name for name, traits in ENGINES.items() if setting in traits.takes)
