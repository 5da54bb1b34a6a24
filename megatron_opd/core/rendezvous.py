"""How the ranks of one machine meet, without a port that anybody else could reach.

torch's usual store is a server: TCPStore listens on every interface, and whoever connects to it can read and write
where ranks find each other. Ranks of one machine need no server. One rank alone keeps its store in its own memory. The
ranks of the local launcher share a file in memory that only their user can open: it has no name in any file system, and
the kernel frees it with the last process of the run, however that ends. Ranks of torchrun and srun meet as those say.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

import torch.distributed as dist

from megatron_opd.core.private_file import private_file

STORE = "MEGATRON_OPD_STORE"
"""The environment variable that tells ranks the path of their store."""
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


@contextmanager
def private_store() -> Iterator[dict[str, str]]:
    """Environment variables with which the ranks that this process starts find each other, until the block ends.

    A run that starts again needs a new store: the old one tells where the dead ranks were.
    """
    with private_file("store") as path:
        yield {STORE: path}


def join(backend: str, timeout: datetime.timedelta, *, stay_here: bool = True) -> None:
    """Start torch.distributed among the ranks that the environment tells of.

    When all ranks are on this machine, they use the loopback interface only, unless GLOO_SOCKET_IFNAME and
    NCCL_SOCKET_IFNAME say otherwise or `stay_here` is false: this process will talk to another machine, too.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if stay_here and _is_one_machine(ranks):
        stay_on_loopback(os.environ)
    store: dist.Store | None = None
    if ranks == 1:
        store = dist.HashStore()
    elif path := os.environ.get(STORE):
        store = dist.FileStore(path, ranks)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
        return
    store.set_timeout(timeout)
    rank = int(os.environ.get("RANK", "0"))
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)


def stay_on_loopback(environ: MutableMapping[str, str]) -> None:
    """Have gloo and NCCL listen on loopback only. By default gloo takes the address that the machine's name has, and
    NCCL any interface but loopback."""
    for name in _INTERFACES:
        environ.setdefault(name, _LOOPBACK)


def _is_one_machine(ranks: int) -> bool:
    """srun does not say; its ranks meet on the cluster's network also within one node."""
    return ranks == 1 or os.environ.get("LOCAL_WORLD_SIZE") == str(ranks)
