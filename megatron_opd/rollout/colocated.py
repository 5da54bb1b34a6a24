"""Servers on the trainer's own GPUs (`rollout.servers.colocated`): who has the memory when.

    sample ──► release: servers stop and give back everything ──► score, train ──► make_room ──► sync ──► sample
                                                                        weights' place, weights, cache's place

All of it is collective over the ranks: nobody computes before the servers are gone, and no server comes back before
every rank has given back what it does not use.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import torch

from megatron_opd.config import RolloutConfig, ServersConfig
from megatron_opd.core.parallel import Parallel

if TYPE_CHECKING:
    from megatron_opd.sglang.client import Client


def clear_for_ranks(rollout: RolloutConfig, parallel: Parallel) -> None:
    """Servers come up before the ranks, with all their memory: have them give it back before a rank loads a model.

    `rollout` has their urls. One that cannot be reached is left to the pool. Raises ValueError for one that was started
    without what it needs.
    """
    if rollout.shares_gpus:
        parallel.share_world(lambda: asyncio.run(_clear(rollout.servers)))


def make_room(parallel: Parallel) -> None:
    """What this rank's allocator keeps for later goes back to the GPU; returns when that is so on every rank."""
    torch.cuda.empty_cache()  # does nothing where there is no GPU
    parallel.any_world(False)


async def _clear(servers: ServersConfig) -> None:
    from megatron_opd.sglang.client import Client

    clients = [Client(url, servers, vocab_size=1, context=1) for url in servers.urls]
    try:
        await asyncio.gather(*(_clear_one(client) for client in clients))
    finally:
        for client in clients:
            await client.close()


async def _clear_one(client: Client) -> None:
    from megatron_opd.sglang import server_memory
    from megatron_opd.sglang.errors import SGLangError

    try:
        if torch.cuda.is_available() and not await server_memory.has_saver(client):
            raise ValueError(
                f"rollout.servers.colocated: the server {client.url} was started without --enable-memory-saver, so it"
                " cannot give its memory back"
            )
        await server_memory.release(client)
    except SGLangError:
        return  # lost before the run begins; the first weights show whether any other is left
