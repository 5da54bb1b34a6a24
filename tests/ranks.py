"""Rank processes for tests, forked from a warm process (`warm.py`) and kept for the session.

`run(n, fn, *args)` starts a fresh process group over the first n of them, calls `fn(parallel, *args)` on each and
returns the results by rank. `fn` must be a module-level function; arguments and results travel by plain pickle.
A rank that fails or hangs ends in `RankError`, with the traceback of the rank that failed first on top; ranks that do
not come back then are killed (by their own process ids) and the next call starts new ones.
"""

from __future__ import annotations

import gc
import os
import pickle
import socket
import sys
import time
import traceback
import types
from multiprocessing.connection import Connection, wait

import torch.distributed as dist
import warm

TIMEOUT_S = 300.0
GRACE_S = 3.0
"""How long the other ranks may still take once one has failed."""


class RankError(AssertionError):
    """A rank failed or did not come back."""


class Ranks:
    """The pool."""

    def __init__(self) -> None:
        self._workers: list[tuple[warm.Process, Connection]] = []

    def run(self, num_ranks, fn, *args, timeout_s=TIMEOUT_S, **layout):
        """`fn(parallel, *args)` on `num_ranks` ranks; `layout` are settings of ParallelConfig (default: tensor)."""
        while len(self._workers) < num_ranks:
            self._workers.append(_start())
        layout = layout or {"tensor": num_ranks}
        connections = [connection for _, connection in self._workers[:num_ranks]]
        # Served from here, as torchrun serves it: a port that rank 0 were told could be taken until it listens.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, connection in enumerate(connections):
            connection.send_bytes(pickle.dumps((fn, args, layout, (rank, num_ranks, store.port))))
        return self._results(connections, timeout_s)

    def _results(self, connections, timeout_s):
        results, failures, waiting = {}, [], set(connections)
        deadline = time.monotonic() + timeout_s
        while waiting and (ready := wait(waiting, timeout=max(deadline - time.monotonic(), 0))):
            for connection in ready:
                waiting.discard(connection)
                rank = connections.index(connection)
                try:
                    result, failure = pickle.loads(connection.recv_bytes())
                except EOFError:
                    result, failure = None, "the process died\n"
                    deadline = 0.0
                results[rank] = result
                if failure:
                    failures.append((rank, failure))
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        silent = [rank for rank, connection in enumerate(connections) if connection in waiting]
        if silent or any("process died" in failure for _, failure in failures):
            self.close()
        if failures or silent:
            reports = [f"rank {rank}:\n{failure}" for rank, failure in sorted(failures, key=_is_consequence)]
            reports += [f"ranks that did not come back and were killed: {silent}"] if silent else []
            raise RankError("\n".join(reports))
        return [results[rank] for rank in range(len(connections))]

    def close(self):
        for process, connection in self._workers:
            process.kill()
            process.wait(120)
            connection.close()
        self._workers.clear()


def _is_consequence(failure):
    """Whether a rank failed because another one was gone: gloo says so at once, often before that one has reported."""
    return "Connection closed by peer" in failure[1] or "Connection reset by peer" in failure[1]


def _start():
    ours, theirs = socket.socketpair()
    code = f"import sys; sys.path[:] = {sys.path!r}; import ranks; ranks.serve()"
    with theirs:
        process = warm.start(["-c", code], stdin=theirs.fileno(), stdout=1, stderr=2)
    return process, Connection(ours.detach())


def serve():
    """A rank's life: one request after the other, which come by its stdin, until the pool goes away."""
    import torch

    from megatron_opd.student import cpu

    connection = Connection(os.dup(0))
    torch.set_num_threads(1)
    cpu.enable()
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            sys.exit()
        try:
            reply = pickle.dumps((_call(*pickle.loads(request)), None))
        except BaseException:
            reply = pickle.dumps((None, traceback.format_exc()))
        connection.send_bytes(reply)


def _call(fn, args, layout, place):
    from megatron.core import parallel_state

    from megatron_opd.config import ParallelConfig, RunConfig
    from megatron_opd.student import groups

    rank, world_size, port = place
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    try:
        parallel = groups.start(ParallelConfig(**layout), RunConfig(dir="unused", seed=1, timeout_s=TIMEOUT_S))
        return fn(parallel, *args)
    finally:
        parallel_state.destroy_model_parallel()
        groups.stop()
        _forget_models()


def _forget_models():
    """Free the models of the test that is over, and with them their process groups.

    Megatron's DDP is held by the gradient hooks that hold it, in a cycle through C++ that Python's collector does not
    see. Each gloo group has threads that wake up a hundred times a second, so a rank that keeps them gets ever slower.
    """
    from megatron.core.distributed import DistributedDataParallel

    for model in [thing for thing in gc.get_objects() if isinstance(thing, DistributedDataParallel)]:
        for cell in [holder for holder in gc.get_referrers(model) if isinstance(holder, types.CellType)]:
            del cell.cell_contents
    gc.collect()
