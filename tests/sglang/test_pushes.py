"""A weight push over stand-ins: which version servers have then, and which of them may work."""

import pytest
import torch
from standin import settings
from standin_model import CONTEXT, VOCAB_SIZE

from megatron_opd.config import RolloutConfig
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.errors import Down
from megatron_opd.sglang.weights.sync import WeightPush


@pytest.fixture
def make_push(loop, tmp_path):
    """(the push, clients of the stand-ins, versions whose directories were written)."""
    made = []

    def make(servers, way):
        config, written = settings(servers), []

        def write(weights, directory):
            list(weights)
            written.append(directory.name)
            directory.mkdir(parents=True)

        push = WeightPush(
            RolloutConfig(sync=way, servers=config), loop, model="m", write=write, spool=tmp_path / "spool"
        )
        clients = [Client(url, config, vocab_size=VOCAB_SIZE, context=CONTEXT) for url in config.urls]
        made.append((push, clients))
        return push, clients, written

    yield make
    for push, clients in made:
        push.close()
        for client in clients:
            loop.run(client.close(), 10)


def weights(read):
    """Three tensors; `read` gets the names of those that somebody read."""
    for name in "abc":
        read.append(name)
        yield name, torch.zeros(3)


@pytest.mark.parametrize("way", ["tensor", "disk"])
def test_servers_have_the_version_that_was_pushed(servers, make_push, way):
    both = servers(2)
    push, clients, _ = make_push(both, way)
    for version in (1, 2, 7):
        read = []
        assert push.push(clients, weights(read), version) == {}
        assert [server.version for server in both] == [str(version)] * 2
        assert read == ["a", "b", "c"]


@pytest.mark.parametrize("way", ["tensor", "disk"])
def test_the_stream_is_run_to_its_end_also_when_nobody_takes_it(servers, make_push, way):
    """Other ranks gather the weights with us, and would wait for ever."""
    (server,) = servers(1)
    push, clients, _ = make_push([server], way)
    server.kill()
    read = []
    with pytest.raises(Down, match="no server has taken the weights"):
        push.push(clients, weights(read), 1)
    assert read == ["a", "b", "c"]


def test_a_server_that_started_anew_is_given_the_weights_where_they_are_kept(servers, loop, make_push):
    first, second = servers(2)
    push, clients, written = make_push([first, second], "disk")
    push.push(clients, weights([]), 3)
    loop.run(push.give(clients[0]), 10)
    assert written == ["v3"]  # it had them
    first.version = "0"
    loop.run(push.give(clients[0]), 10)
    assert (first.version, second.version) == ("3", "3")


def test_it_waits_for_the_next_ones_where_they_are_not(servers, loop, make_push):
    (server,) = servers(1)
    push, clients, _ = make_push([server], "tensor")
    with pytest.raises(Down, match="there are no weights yet"):
        loop.run(push.give(clients[0]), 10)
    push.push(clients, weights([]), 3)
    loop.run(push.give(clients[0]), 10)
    server.version = "0"
    with pytest.raises(Down, match="waits for the next weights, which will be of version 4"):
        loop.run(push.give(clients[0]), 10)
    push.push(clients, weights([]), 4)
    loop.run(push.give(clients[0]), 10)


def test_the_stream_is_run_to_its_end_also_when_nothing_of_it_was_read(servers, make_push, monkeypatch):
    push, clients, _ = make_push(servers(1), "tensor")

    def fail(*_):
        raise RuntimeError("before the first tensor")

    monkeypatch.setattr(push._transport, "send", fail)
    read = []
    with pytest.raises(RuntimeError, match="before the first tensor"):
        push.push(clients, weights(read), 1)
    assert read == ["a", "b", "c"]
