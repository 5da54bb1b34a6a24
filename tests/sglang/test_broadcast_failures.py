"""A member of the group fails: what we hold of the group goes at once, because that is what sets the others free."""

import asyncio
import gc
import weakref

import pytest

from megatron_opd.sglang.errors import Down
from megatron_opd.sglang.weights import broadcast
from megatron_opd.sglang.weights.group import in_thread


class Connections:
    """What the others wait in as long as it lives."""


class Group:
    """As BroadcastGroup; our part of its collective fails in a thread, which has the connections at hand."""

    def __init__(self, fails_after_s):
        self.connections, self.fails_after_s = Connections(), fails_after_s

    async def broadcast(self):
        held = self.connections
        await asyncio.sleep(self.fails_after_s)

        def send():
            assert held is not None
            raise RuntimeError("Connection closed by peer")

        await in_thread(send)

    def let_go(self):
        pass

    def drop(self):
        self.connections = None


@pytest.mark.parametrize("ours_after_s", [0.0, 0.1])
@pytest.mark.parametrize("theirs_after_s", [0.0, 0.05, 0.2])
def test_the_others_are_set_free(loop, monkeypatch, ours_after_s, theirs_after_s):
    """In whatever order our part and the request of the one that died fail; no collection of garbage is needed."""
    monkeypatch.setattr(broadcast, "GRACE_S", 5.0)
    group = Group(ours_after_s)
    connections = weakref.ref(group.connections)

    async def dies():
        await asyncio.sleep(theirs_after_s)
        raise Down("cannot write request body")

    async def waits():
        while connections() is not None:
            await asyncio.sleep(0.01)

    dead, alive = type("Client", (), {"url": "dead"})(), type("Client", (), {"url": "alive"})()
    gc.disable()
    try:
        together = broadcast._together(group, {dead: dies(), alive: waits()}, group.broadcast())
        assert list(loop.run(together, 60)) == [dead]
    finally:
        gc.enable()
