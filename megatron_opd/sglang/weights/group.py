"""The process group of this process, which is rank 0, and all ranks of all servers; outside the trainer's groups.

A collective waits for every member, and a server that refuses or dies never joins, so nothing here waits in the event
loop's thread: joining and sending run in threads that can be left behind, and dropping the group sets free those who
wait in it.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

_T = TypeVar("_T")
LOOPBACK = "127.0.0.1"


class BroadcastGroup:
    """Rank 0 of a group of `world_size`. Construct it, tell the servers `address`, and `await join()`."""

    def __init__(self, world_size: int, urls: Sequence[str], timeout_s: float) -> None:
        self.name = f"megatron-opd-{uuid.uuid4().hex[:12]}"
        self.backend = "nccl" if torch.cuda.is_available() else "gloo"
        self.world_size = world_size
        self.timeout = datetime.timedelta(seconds=timeout_s)
        self.process_group: dist.ProcessGroup | None = None
        host = own_address(urls)
        listener = socket.create_server((host, 0), backlog=max(world_size, 16))  # bound to no other interface
        self.address: tuple[str, int] = (host, listener.getsockname()[1])
        # Only this object keeps the store alive. Everybody, this process too, waits in a connection to it; dropping it
        # breaks those, and everybody stops waiting.
        self._store: dist.TCPStore | None = dist.TCPStore(
            *self.address,
            is_master=True,
            wait_for_workers=False,
            timeout=self.timeout,
            master_listen_fd=listener.detach(),
        )

    async def join(self) -> None:
        """Returns when all ranks are in. Raises RuntimeError when that fails or the group is dropped."""
        self.process_group = await in_thread(self._join)

    def _join(self) -> dist.ProcessGroup:
        # As SGLang makes its side (`init_custom_process_group`): a group beside the default one, by torch's own helper.
        from torch.distributed import distributed_c10d as c10d

        store = dist.TCPStore(*self.address, is_master=False, timeout=self.timeout)
        made, _ = c10d._new_process_group_helper(
            self.world_size,
            0,
            [],
            dist.Backend(self.backend),
            dist.PrefixStore(self.name, store),
            group_name=self.name,
            timeout=self.timeout,
        )
        c10d._world.pg_group_ranks[made] = {rank: rank for rank in range(self.world_size)}
        return made

    async def broadcast(self, flat: torch.Tensor) -> None:
        """Send its bytes to all ranks. Raises RuntimeError when the connection to one breaks or `timeout_s` is over."""
        assert self.process_group is not None
        group = self.process_group
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)  # it was filled on the stream of another thread

        def send() -> None:
            dist.broadcast(flat.view(torch.uint8), src=0, group=group)  # as servers receive it; gloo knows no FP8
            if flat.is_cuda:
                torch.cuda.synchronize(flat.device)

        await in_thread(send)

    def let_go(self) -> None:
        """Somebody will not come: have all who still wait to join end with an error at once."""
        self._store = None

    def drop(self) -> None:
        """Leave, whatever the others do. What still waits in it ends with an error at its time-out."""
        self.let_go()
        group, self.process_group = self.process_group, None
        if group is None:
            return

        def leave() -> None:
            with suppress(RuntimeError, ValueError, AttributeError):
                if self.backend == "nccl":
                    group.abort()
                dist.destroy_process_group(group)

        threading.Thread(target=leave, name="drop-group", daemon=True).start()


def own_address(urls: Sequence[str]) -> str:
    """The address by which the servers reach this machine: loopback when all of them are here."""
    hosts = [urlsplit(url).hostname or LOOPBACK for url in urls]
    addresses = [
        socket.getaddrinfo(host, None)[0][4][0] if ":" in host else socket.gethostbyname(host) for host in hosts
    ]
    remote = [a for a in addresses if not ipaddress.ip_address(a).is_loopback]
    if not remote:
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((remote[0], 9))  # nothing is sent: this only asks which interface leads there
        return str(probe.getsockname()[0])


async def in_thread(work: Callable[[], _T]) -> _T:
    """The result of `work`, from a thread that nobody waits for: neither a cancelled caller nor the interpreter."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if not future.done():
            future.set_result(result) if error is None else future.set_exception(error)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:
            error = caught.with_traceback(None)  # its frames would keep alive what `work` held
        with suppress(RuntimeError):  # the loop may be gone
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="weights", daemon=True).start()
    return await future
