"""The ways of new weights to servers, by their name in `rollout.sync`, and what each can reach.

Nothing is imported before a transport is built, so settings can be checked against the table without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.config import RolloutConfig

if TYPE_CHECKING:
    from megatron_opd.core.event_loop import Loop
    from megatron_opd.core.named_weights import NamedWeights
    from megatron_opd.sglang.weights.session import Transport


@dataclass(frozen=True, kw_only=True, slots=True)
class TransportInputs:
    """What a transport is built from."""

    rollout: RolloutConfig
    loop: Loop
    write: Callable[[NamedWeights, Path], None]
    """Writes all weights as a Hugging Face directory, which has its name only when it is complete."""
    spool: Path
    """A directory that the servers see under the same path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One of them."""

    build: Callable[[TransportInputs], Transport]
    unfit_for_colocated: str = ""
    """Why it cannot reach servers on the trainer's own GPUs; empty where it can."""
    is_local: bool = False
    """Whether it reaches servers on the machine of rank 0 only, by handles that name one of its GPUs by number."""
    joins_servers: bool = False
    """Whether ranks are in one process group with the servers, which may be on other machines."""


def _broadcast(inputs: TransportInputs) -> Transport:
    from megatron_opd.sglang.weights.broadcast import Broadcast
    from megatron_opd.sglang.weights.stream import Stream

    return Stream(Broadcast(inputs.rollout.servers.request_timeout_s), inputs.loop)


def _tensor(inputs: TransportInputs) -> Transport:
    from megatron_opd.sglang.weights.stream import Stream
    from megatron_opd.sglang.weights.tensor import Inline

    return Stream(Inline(), inputs.loop)


def _disk(inputs: TransportInputs) -> Transport:
    from megatron_opd.sglang.weights.disk import Spool

    return Spool(inputs.write, inputs.spool)


WAYS: dict[str, Way] = {
    "broadcast": Way(
        build=_broadcast, unfit_for_colocated="NCCL takes a GPU into a group only once", joins_servers=True
    ),
    "tensor": Way(build=_tensor, is_local=True),
    "disk": Way(build=_disk),
}


def check_sync(rollout: RolloutConfig) -> list[str]:
    """What is wrong with `rollout.sync`: it names no way, or one that cannot reach the servers."""
    if rollout.sync not in WAYS:
        return [f"rollout.sync must be one of {', '.join(WAYS)}, not {rollout.sync!r}"]
    why = WAYS[rollout.sync].unfit_for_colocated
    if not (rollout.servers.colocated and why):
        return _check_rows(rollout) if WAYS[rollout.sync].is_local and rollout.is_served else []
    fit = {name: way for name, way in WAYS.items() if not way.unfit_for_colocated}
    others = " or ".join(f"{name}{' (servers on one machine)' if way.is_local else ''}" for name, way in fit.items())
    return [f"rollout.sync: {rollout.sync} is not for rollout.servers.colocated, because {why}; choose {others}"]


def _check_rows(rollout: RolloutConfig) -> list[str]:
    """Whether the GPUs of each server follow each other: one that sees all of them is told its first one only."""
    servers = rollout.servers
    own = [servers.gpus[i : i + servers.tensor] for i in range(0, len(servers.gpus), servers.tensor)]
    odd = [gpus for gpus in own if gpus != list(range(gpus[0], gpus[0] + len(gpus)))]
    if servers.urls or not odd:
        return []
    return [
        f"rollout.servers.gpus: with rollout.sync: {rollout.sync} the {servers.tensor} GPUs of a server must be numbers"
        f" in a row, not {odd[0]}; write others, or choose rollout.sync: broadcast or disk"
    ]


def way_of(rollout: RolloutConfig) -> Way:
    """The one that `rollout.sync` names. Raises ValueError as `check_sync` has it."""
    if problems := check_sync(rollout):
        raise ValueError(*problems)
    return WAYS[rollout.sync]
