"""Fixtures over the stand-in: servers, clients and pools that end with the test."""

import pytest
from standin import PROBE_S, StandIn, settings
from standin_model import CONTEXT, VOCAB_SIZE

from megatron_opd.core.event_loop import Loop
from megatron_opd.sglang.client import ADMIN_KEY, API_KEY, Client
from megatron_opd.sglang.pool import Pool


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    monkeypatch.delenv(API_KEY, raising=False)
    monkeypatch.delenv(ADMIN_KEY, raising=False)


@pytest.fixture
def servers():
    """Make stand-ins: `first, second = servers(2)`."""
    made = []

    def make(count=1, **settings):
        made.extend(new := [StandIn(**settings) for _ in range(count)])
        return new

    yield make
    for server in made:
        server.close()


PATIENCE = 20
"""Seconds that tests give to a coroutine are those of an idle machine; so many times as long is a hang."""


@pytest.fixture
def loop():
    loop = Loop()
    run = loop.run
    loop.run = lambda coroutine, timeout_s=None: run(coroutine, timeout_s and PATIENCE * timeout_s)
    yield loop
    loop.close()


@pytest.fixture
def make_pool(loop):
    """A pool over stand-ins; `on_return` and `probe_s` as Pool has them, the rest are settings."""
    made = []

    def make(servers, *, on_return=None, vocab_size=VOCAB_SIZE, probe_s=PROBE_S, **changes):
        config = settings(servers, **changes)
        clients = [Client(url, config, vocab_size=vocab_size, context=CONTEXT) for url in config.urls]
        made.append(Pool(clients, config, name="student", on_return=on_return, pause_s=0.05, probe_s=probe_s))
        return made[-1]

    yield make
    for pool in made:
        loop.run(pool.close(), 10)


@pytest.fixture
def client(servers, make_pool):
    """(client, its stand-in)."""
    (server,) = servers(1)
    return make_pool([server]).up()[0], server
