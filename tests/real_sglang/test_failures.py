"""Real servers that are killed: in the middle of answers, of a weight update; and one that comes back."""

import asyncio
import os
import random
import signal
import time
from dataclasses import replace

import pytest
import tiny
import torch
from conftest import CONTEXT, VOCAB_SIZE
from safetensors.torch import load_file

from megatron_opd.config import RolloutConfig
from megatron_opd.core.event_loop import Loop
from megatron_opd.core.types import Sampling
from megatron_opd.rollout.served_engine import SGLangEngine
from megatron_opd.sglang import ports, process
from megatron_opd.sglang.pool import connect
from megatron_opd.sglang.weights import broadcast
from megatron_opd.sglang.weights import stream as stream_module
from megatron_opd.sglang.weights.sync import WeightPush
from megatron_opd.sglang.wire import ServerLimits

FAMILY = "qwen3"
EOS = (2,)


@pytest.fixture(scope="module")
def fleet(models, tmp_path_factory):
    """(servers, settings, start_again): two servers, of which tests kill one and start it again on its port."""
    from conftest import ROOT

    logs = tmp_path_factory.mktemp("logs")
    python = str(ROOT / ".venv-sglang/bin/python")
    common = {"dtype": "fp32", "start_timeout_s": 300.0, "request_timeout_s": 20.0, "retries": 4}
    settings = process.ServersConfig(python=python, count=2, port=31500, **common)
    running = process.start(settings, models[FAMILY][1], name="first", log_dir=logs, context=CONTEXT)

    def start_again(old):
        port = int(old.url.rpartition(":")[2])
        ports._TAKEN.pop(port).close()
        one = replace(settings, count=1, port=port)
        (new,) = process.start(one, models[FAMILY][1], name="second", log_dir=logs, context=CONTEXT)
        running.append(new)
        assert new.url == old.url
        process.wait([new], settings, say=print)
        return new

    try:
        process.wait(running, settings, say=print)
        yield list(running), replace(settings, urls=[server.url for server in running]), start_again
    finally:
        process.stop(running)


@pytest.fixture
def engine(models, fleet, tmp_path):
    _, settings, _ = fleet
    loop = Loop()
    rollout = RolloutConfig(engine="sglang", servers=settings, sync_verify=True)
    sync = WeightPush(rollout, loop, model=models[FAMILY][1], write=None, spool=tmp_path)
    pool = connect(settings, ServerLimits(vocab_size=VOCAB_SIZE, context=CONTEXT), name="student", on_return=sync.give)
    engine = SGLangEngine(pool, loop, sync, eos_ids=EOS, vocab_size=VOCAB_SIZE)
    yield engine
    engine.close()


def weights(models, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in load_file(f"{models[FAMILY][1]}/model.safetensors").items():
        yield name, tensor + 0.01 * torch.randn(tensor.shape, generator=generator)


def kill(server):
    os.killpg(server.pid, signal.SIGKILL)
    server.process.wait(10)


def prompts(count):
    draw = random.Random(0)
    return [tiny.rollout(draw.choices(range(3, 90), k=9), (3,), index=i).prompt for i in range(count)]


def test_a_server_killed_in_the_middle_of_answers_and_of_an_update(models, fleet, engine, monkeypatch):
    servers, _, start_again = fleet
    engine.load(weights(models, 1), 1)
    # Enough of them, and none that ends early: a fast machine does two samples of each in less than the wait.
    monkeypatch.setattr(engine, "banned_ids", EOS)
    sampling = Sampling(max_new_tokens=250, temperature=1.0, samples_per_prompt=4)

    asked = prompts(8)
    future = engine.loop.start(engine._all(asked, sampling, lambda _: None))
    engine.loop.run(asyncio.sleep(0.5))
    assert not future.done()
    kill(servers[1])
    rollouts = future.result(120)
    assert [(r.prompt.index, r.sample) for r in rollouts] == [(i, s) for i in range(8) for s in range(4)]
    assert all(len(r.token_ids) == 250 for r in rollouts)
    metrics = engine.metrics()
    assert metrics["rollout/losses"] == 1
    assert metrics["rollout/servers_down"] == 1

    started = time.monotonic()
    engine.load(weights(models, 2), 2)  # the dead one is left out
    assert time.monotonic() - started < 15
    assert [c.url for c in engine.pool.up()] == [servers[0].url]

    back = start_again(servers[1])
    time.sleep(2)  # it is probed, but has not the weights of version 2
    assert [c.url for c in engine.pool.up()] == [servers[0].url]
    engine.load(weights(models, 3), 3)
    assert len(engine.pool.up()) == 2
    assert {v for r in engine.generate(asked, replace(sampling, max_new_tokens=5)) for v in r.versions} == {3}

    # Now one dies between two buckets, one of which it has.
    sent = []
    real = broadcast.Broadcast.send

    async def send(self, clients, bucket, version):
        if len(sent) == 1:
            kill(back)
        sent.append(bucket.names)
        return await real(self, clients, bucket, version)

    monkeypatch.setattr(broadcast.Broadcast, "send", send)
    buckets = stream_module.buckets
    monkeypatch.setattr(stream_module, "buckets", lambda pairs: buckets(pairs, 20_000))
    started = time.monotonic()
    engine.load(weights(models, 4), 4)  # sync_verify: the other one has every bit
    assert time.monotonic() - started < 2 * broadcast.GRACE_S
    assert len(sent) > 2
    assert [c.url for c in engine.pool.up()] == [servers[0].url]
    assert {v for r in engine.generate(asked, replace(sampling, max_new_tokens=5)) for v in r.versions} == {4}


def test_a_server_that_hangs_in_an_update_costs_a_time_out_and_not_the_run(models, fleet, engine, monkeypatch):
    """Two servers, one stopped (SIGSTOP) as a broadcast begins."""
    servers, _, start_again = fleet
    back = start_again(servers[1])
    engine.load(weights(models, 5), 5)
    assert len(engine.pool.up()) == 2
    real = broadcast.Broadcast._round

    async def stop_then_send(self, clients, bucket, version):
        os.killpg(back.pid, signal.SIGSTOP)
        return await real(self, clients, bucket, version)

    monkeypatch.setattr(broadcast.Broadcast, "_round", stop_then_send)
    try:
        engine.load(weights(models, 6), 6)
        assert [c.url for c in engine.pool.up()] == [servers[0].url]
        rollouts = engine.generate(prompts(2), Sampling(max_new_tokens=5, temperature=1.0))
        assert {v for r in rollouts for v in r.versions} == {6}
    finally:
        os.killpg(back.pid, signal.SIGCONT)
        kill(back)
