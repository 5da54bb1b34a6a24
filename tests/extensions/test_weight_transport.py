"""A way of weights to servers of one's own: two files, tests and docs apart.

sglang/weights/kept.py           the transport: `Kept` below
sglang/weights/transports.py     a line of WAYS: how it is built, and what it reaches
"""

from pathlib import Path

import pytest
import torch
from standin import StandIn, settings, wait_for
from standin_model import CONTEXT, END, VOCAB_SIZE

from megatron_opd.__main__ import main
from megatron_opd.config import RolloutConfig
from megatron_opd.core.event_loop import Loop
from megatron_opd.core.types import Prompt, Sampling
from megatron_opd.rollout.served_engine import SGLangEngine
from megatron_opd.sglang.client import ADMIN_KEY, API_KEY
from megatron_opd.sglang.pool import connect
from megatron_opd.sglang.weights.buckets import buckets
from megatron_opd.sglang.weights.sync import WeightPush
from megatron_opd.sglang.weights.tensor import Inline
from megatron_opd.sglang.weights.transports import WAYS, Way
from megatron_opd.sglang.wire import ServerLimits

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [Prompt(source="a", index=i, text="", token_ids=(3, 4 + i)) for i in range(3)]
SAMPLING = Sampling(max_new_tokens=4, temperature=1.0, seed=7)
UPDATE = "/update_weights_from_tensor"


class Kept:
    """Sends weights inside the requests, and keeps the newest in memory for servers that lose them."""

    def __init__(self, inputs):
        self.kept, self.is_closed = [], False

    def send(self, session, weights, version, label):
        self.kept = list(buckets(weights))
        session.each(lambda client: self._give(client, label))

    async def again(self, client, version):
        await self._give(client, str(version))
        await client.resume()
        return True

    def close(self):
        self.is_closed = True

    async def _give(self, client, label):
        await client.stop_sampling()
        await client.begin_weight_update()
        for bucket in self.kept:
            for error in (await Inline().send([client], bucket, label)).values():
                raise error
        await client.end_weight_update()


@pytest.fixture(autouse=True)
def way(monkeypatch):
    monkeypatch.setitem(WAYS, "kept", Way(build=Kept, is_local=True))


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """(an engine over two stand-ins, its sync, the stand-ins)."""
    for key in (API_KEY, ADMIN_KEY):
        monkeypatch.delenv(key, raising=False)
    started, loop = [StandIn(), StandIn()], Loop()
    rollout = RolloutConfig(engine="sglang", sync="kept", servers=settings(started))
    sync = WeightPush(rollout, loop, model="model", write=None, spool=tmp_path)
    limits = ServerLimits(vocab_size=VOCAB_SIZE, context=CONTEXT)
    pool = connect(rollout.servers, limits, name="student", on_return=sync.give)
    pool._probe_s = 0.05
    made = SGLangEngine(pool, loop, sync, eos_ids=(END,), vocab_size=VOCAB_SIZE)
    yield made, sync, started
    made.close()
    for server in started:
        server.close()


def weights():
    return iter([("a", torch.zeros(3)), ("b", torch.ones(2).bfloat16())])


def test_weights_arrive_by_it(engine):
    engine, sync, started = engine
    for version in (1, 2):
        engine.load(weights(), version)
        assert [server.version for server in started] == [str(version)] * 2
        rollouts = engine.generate(PROMPTS, SAMPLING)
        assert {v for r in rollouts for v in r.versions} == {version}
    assert [server.paths.count(UPDATE) for server in started] == [4, 4]  # a type is a bucket
    sync.close()
    assert sync._transport.is_closed


def test_a_server_that_lost_them_gets_them_again(engine):
    engine, _, (lost, _) = engine
    engine.load(weights(), 1)
    lost.kill()
    engine.generate(PROMPTS, SAMPLING)
    lost.version = "default"
    lost.start()
    wait_for(lambda: len(engine.pool.up()) == 2)
    assert lost.version == "1"


def test_the_command_line_knows_it(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    given = ["examples/quickstart.yaml", f"run.dir={tmp_path}", "rollout.engine=sglang"]
    assert main(["check", "--settings-only", *given, "rollout.sync=kept"]) == 0
    assert "SGLang servers for rollout" in capsys.readouterr().out
    assert main(["check", "--settings-only", *given, "rollout.sync=lost"]) == 1
    assert "must be one of broadcast, tensor, disk, kept, not 'lost'" in capsys.readouterr().err
