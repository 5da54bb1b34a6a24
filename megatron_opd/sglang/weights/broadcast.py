"""Weights by broadcast: one process group with all servers (NCCL on GPUs, gloo without), one collective a bucket.

A collective and the requests that announce it run at the same time. As soon as one request fails, the others have
`GRACE_S` to answer, and as long again once we have left the group. A new one is then made with the servers that are
left, and the bucket is sent again, which is harmless for those that had it. What was sent before is still on the
servers, so nothing is replayed, and nobody ever waits for longer than `servers.request_timeout_s`. Members with another
NCCL than ours are an error at once: every group would fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any

from megatron_opd.sglang import nccl
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.errors import Down, Refused, SGLangError, Unfit
from megatron_opd.sglang.weights.buckets import Bucket
from megatron_opd.sglang.weights.group import BroadcastGroup
from megatron_opd.sglang.weights.session import Failures, at_once

GRACE_S = 10.0
_ROUNDS = 3
"""Tries at a bucket. Every one but the last loses a server or is for a server that was a victim of another one."""
_VICTIM = ("Failed to receive weights", "Failed to initialize custom process group")
"""What SGLang says when its part of a collective ended with an error: the cause is another member, or the network."""
_DESTROY_S = 10.0


class Broadcast:
    """A Sender, one update at a time."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._group: BroadcastGroup | None = None
        self._members: list[Client] = []

    async def send(self, clients: Sequence[Client], bucket: Bucket, label: str) -> Failures:
        """Give the bucket to all of them, whose weights are of version `label` then; those that did not take it, and
        why. Raises Unfit when no group with them can ever be made."""
        failed: Failures = {}
        left = list(clients)
        for _ in range(_ROUNDS):
            failures = await self._join(left) if self._members != left else {}
            failures = failures or await self._round(left, bucket, label)
            if not failures:
                return failed
            await self.drop()
            if unfit := next((e for e in failures.values() if isinstance(e, Unfit)), None):
                raise unfit
            lost = {c: e for c, e in failures.items() if not _is_victim(e)}
            failed |= lost
            left = [c for c in left if c not in lost]
            if not left:
                return failed
        return failed | failures

    async def drop(self) -> None:
        """Leave the group, and have the members leave it. The next `send` makes another one."""
        group, members = self._group, self._members
        self._group, self._members = None, []
        if group is None:
            return
        group.drop()
        await asyncio.gather(*(_forget(client, group.name) for client in members))

    async def _join(self, clients: list[Client]) -> Failures:
        """Make the group of this process and all ranks of `clients`."""
        await self.drop()
        sizes, failures = await _ranks(clients)
        if failures:
            return failures
        group = self._group = BroadcastGroup(1 + sum(sizes), [c.url for c in clients], self.timeout_s)
        self._members = list(clients)
        requests = {}
        offset = 1
        for client, size in zip(clients, sizes, strict=True):
            body = {
                "master_address": group.address[0],
                "master_port": group.address[1],
                "rank_offset": offset,
                "world_size": group.world_size,
                "group_name": group.name,
                "backend": group.backend,
            }
            requests[client] = client.order("/init_weights_update_group", body, self.timeout_s)
            offset += size
        return await _together(group, requests, group.join())

    async def _round(self, clients: list[Client], bucket: Bucket, label: str) -> Failures:
        group = self._group
        assert group is not None
        body = {
            "names": bucket.names,
            "dtypes": [bucket.dtype] * len(bucket.names),
            "shapes": [list(shape) for shape in bucket.shapes],
            "group_name": group.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
            "weight_version": label,
        }
        requests = {c: c.order("/update_weights_from_distributed", body, self.timeout_s) for c in clients}
        return await _together(group, requests, group.broadcast(bucket.flat))


async def _together(
    group: BroadcastGroup, requests: dict[Client, Coroutine[Any, Any, Any]], ours: Coroutine[Any, Any, None]
) -> Failures:
    """Our part of a collective and the requests for the servers' parts, at the same time; who failed.

    Our part is only waited for when all requests succeeded: it may wait for a member that never comes.
    """
    tasks = {asyncio.ensure_future(request): client for client, request in requests.items()}
    mine = asyncio.ensure_future(ours)
    waiting: set[asyncio.Future[Any]] = {mine, *tasks}
    timeout = None
    is_left = False
    while waiting - {mine}:
        done, waiting = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not done and is_left:
            break
        if any(task.exception() for task in done):
            timeout = GRACE_S
            group.let_go()
        if not done or _has_failed(mine):  # the others may be waiting for us: leaving sets them free
            group.drop()
            is_left = True
    failures = {client: _failure(task, client) for task, client in tasks.items() if not _succeeded(task)}
    if failures:
        if why := nccl.explain([*map(str, failures.values()), _words(mine)]):
            failures = dict.fromkeys(failures, Unfit(why))
        mine.cancel()
    else:
        try:
            await mine
        except RuntimeError as error:  # everybody has what was sent, but the group may be broken
            why = nccl.explain([str(error)])
            broken = Unfit(why) if why else Refused(f"{_VICTIM[0]}: {error}")
            failures = dict.fromkeys(tasks.values(), broken)
    for task in tasks:
        task.cancel()
    await asyncio.gather(mine, *tasks, return_exceptions=True)
    return failures


def _has_failed(ours: asyncio.Future[None]) -> bool:
    """Whether our part has failed. Its traceback would keep the group alive, and with it the connections to those who
    wait, so it is dropped. A task has it beside its error until somebody asks for the result."""
    if not ours.done():
        return False
    try:
        ours.result()
    except Exception as error:
        error.__traceback__ = None
        return True
    return False


def _words(ours: asyncio.Future[None]) -> str:
    """The error of our part; empty while there is none."""
    return str(ours.exception() or "") if ours.done() and not ours.cancelled() else ""


def _succeeded(task: asyncio.Future[Any]) -> bool:
    return task.done() and task.exception() is None


def _failure(task: asyncio.Future[Any], client: Client) -> SGLangError:
    if not task.done():
        return Down(f"{client.url}: no answer {GRACE_S:g} s after another member of the weight update failed")
    error = task.exception()
    return error if isinstance(error, SGLangError) else Down(f"{client.url}: {error}")


def _is_victim(error: SGLangError) -> bool:
    return isinstance(error, Refused) and any(words in str(error) for words in _VICTIM)


async def _ranks(clients: Sequence[Client]) -> tuple[list[int], Failures]:
    """Tensor-parallel size of each server; who did not say, or has another layout than a group can reach."""
    infos, failures = await at_once(clients, Client.server_info)
    sizes = []
    for client, info in infos.items():
        if any(info.get(name, 1) != 1 for name in ("dp_size", "pp_size")):
            failures[client] = Refused(
                f"{client.url}: runs with dp_size {info.get('dp_size')} and pp_size {info.get('pp_size')}; 0.5.23 takes"
                " weights by broadcast only without either: use rollout.sync=disk, or more servers"
            )
        else:
            sizes.append(int(info.get("tp_size", 1)))
    return sizes, failures


async def _forget(client: Client, name: str) -> None:
    with suppress(SGLangError):  # it may never have been a member, or be gone
        await client.post("/destroy_weights_update_group", {"group_name": name}, _DESTROY_S)
