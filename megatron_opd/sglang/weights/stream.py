"""Weights bucket by bucket while they are gathered. Nothing is kept, so a server that lost them waits for the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_opd.core.event_loop import Loop
from megatron_opd.core.named_weights import NamedWeights
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.errors import Refused
from megatron_opd.sglang.weights.buckets import Bucket, buckets
from megatron_opd.sglang.weights.session import Failures, Session


class Sender(Protocol):
    """Sends one bucket at a time; on one event loop."""

    async def send(self, clients: Sequence[Client], bucket: Bucket, label: str) -> Failures:
        """Give the bucket to all of them, whose weights are of version `label` then; those that did not take it, and
        why."""

    async def drop(self) -> None:
        """Give up what connects it with servers; the next `send` connects again."""


class Stream:
    """A Transport through a Sender."""

    def __init__(self, sender: Sender, loop: Loop) -> None:
        self.sender, self.loop = sender, loop

    def send(self, session: Session, weights: NamedWeights, version: int, label: str) -> None:
        """Open an update, send the buckets, and end it."""
        session.each(_open)
        for bucket in buckets(weights):
            if session.alive:
                session.lose(self.loop.run(self.sender.send(session.alive, bucket, label)))
        session.each(Client.end_weight_update)

    async def again(self, client: Client, version: int) -> bool:
        """Nothing was kept."""
        return False

    def close(self) -> None:
        """Leave the process group, if there is one."""
        self.loop.run(self.sender.drop())


async def _open(client: Client) -> None:
    await client.stop_sampling()
    try:
        await client.begin_weight_update()
    except Refused:  # still open since an update that broke off
        await client.end_weight_update()
        await client.begin_weight_update()
