"""Servers that share the trainer's GPUs: when they have memory, and what becomes of one that fails or starts anew.

A stand-in dies, as SGLang does, when it is to give back what it has given back, to take what it has, or to compute
without; so `deaths == 0` says that it was asked right.
"""

from types import SimpleNamespace

import pytest
import torch
from standin import KINDS, PROBE_S, settings, wait_for
from standin_model import END, VOCAB_SIZE

from megatron_opd.config import RolloutConfig
from megatron_opd.core.types import Prompt, Sampling
from megatron_opd.rollout import colocated
from megatron_opd.rollout.served_engine import SGLangEngine
from megatron_opd.sglang.errors import Down
from megatron_opd.sglang.follow import Follow
from megatron_opd.sglang.weights.sync import WeightPush

PROMPTS = [Prompt(source="a", index=i, text="", token_ids=tuple(range(3, 5 + i))) for i in range(4)]
SAMPLING = Sampling(max_new_tokens=6, temperature=1.0, samples_per_prompt=2, seed=7)
RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"
MARK, UPDATE = "/update_weight_version", "/update_weights_from_tensor"
CACHE = ["kv_cache", "cuda_graph"]


@pytest.fixture
def make_engine(loop, make_pool, tmp_path):
    """An engine over stand-ins that share our GPUs, with the real weight sync."""

    def make(servers, *, sync=None, way="tensor", probe_s=PROBE_S, **changes):
        rollout = RolloutConfig(engine="sglang", sync=way, servers=settings(servers, colocated=True, **changes))
        sync = sync or WeightPush(rollout, loop, model="model", write=write, spool=tmp_path / "spool")
        pool = make_pool(servers, on_return=sync.give, colocated=True, probe_s=probe_s, **changes)
        return SGLangEngine(pool, loop, sync, eos_ids=(END,), vocab_size=VOCAB_SIZE)

    def write(weights, directory):
        list(weights)
        directory.mkdir(parents=True)

    return make


def weights():
    return iter([("a", torch.zeros(3))])


def versions(rollouts):
    return {version for rollout in rollouts for version in rollout.versions}


@pytest.mark.parametrize("way", ["tensor", "disk"])
def test_memory_goes_and_comes_back_in_the_order_that_weights_need(servers, make_engine, way):
    (server,) = servers(1)
    engine = make_engine([server], way=way)
    engine.load(weights(), 1)
    assert versions(engine.generate(PROMPTS, SAMPLING)) == {1}
    server.paths.clear()
    engine.release()
    assert (server.released, server.paused, server.version) == (set(KINDS), True, "released")
    assert server.paths == ["/model_info", "/model_info", "/pause_generation", "/flush_cache", RELEASE, MARK]
    engine.release()  # harmless
    server.paths.clear()
    server.memory.clear()
    engine.load(weights(), 2)
    assert server.memory == [(RESUME, ["weights"]), (RESUME, CACHE)]
    updated = UPDATE if way == "tensor" else "/update_weights_from_disk"
    order = [p for p in server.paths if p in (RESUME, updated, "/continue_generation")]
    assert order == [RESUME, updated, RESUME, "/continue_generation"]
    assert versions(engine.generate(PROMPTS, SAMPLING)) == {2}
    assert server.deaths == 0


def test_the_first_weights_need_no_room_for_a_cache(servers, make_engine):
    (server,) = servers(1)
    make_engine([server]).load(weights(), 0)
    assert server.memory == [(RELEASE, CACHE), (RESUME, CACHE)]
    assert (server.released, server.deaths, server.version) == (set(), 0, "0")


@pytest.mark.parametrize(
    "broken",
    [(RELEASE, 1), (RESUME, 1), (UPDATE, 1), (RESUME, 2), (MARK, 3)],
    ids=["release", "room for weights", "weights", "room for the cache", "last word"],
)
def test_a_server_that_fails_on_the_way_gets_no_work_until_the_next_weights(servers, make_engine, broken):
    bad, good = servers(2)
    engine = make_engine([bad, good], probe_s=60.0)
    engine.load(weights(), 1)
    for server in (bad, good):
        server.paths.clear()
    bad.broken = {broken}
    engine.release()
    engine.load(weights(), 2)
    assert (bad.released == set()) == (broken in {(RELEASE, 1), (MARK, 3)})
    is_kept = broken == (RELEASE, 1)  # it has all its memory still, and takes the weights like the others
    assert [c.url for c in engine.pool.up()] == [s.url for s in ([bad, good] if is_kept else [good])]
    assert engine.metrics()["rollout/losses"] == 1
    assert versions(engine.generate(PROMPTS, SAMPLING)) == {2}
    engine.release()
    if broken == (MARK, 3):  # it took its memory and could not say so: asked once more, it ends, and starts anew
        engine.load(weights(), 3)
        assert bad.deaths == 1
        bad.version = "default"
        bad.start()
        engine.release()
    engine.load(weights(), 4)
    assert len(engine.pool.up()) == 2
    assert versions(engine.generate(PROMPTS, SAMPLING)) == {4}
    assert good.deaths == 0
    assert bad.deaths == (broken == (MARK, 3))


def test_none_that_comes_back_is_none_left(servers, make_engine):
    (server,) = servers(1)
    engine = make_engine([server])
    engine.load(weights(), 1)
    engine.release()
    server.broken = {(RESUME, n) for n in range(1, 9)}
    with pytest.raises(Down, match="no server has taken the weights"):
        engine.load(weights(), 2)


def test_a_server_that_still_computes_is_left_alone(servers, make_engine):
    """To give memory back then would be its end."""
    (server,) = servers(1)
    engine = make_engine([server])
    engine.load(weights(), 1)
    server.broken = {("/flush_cache", server.paths.count("/flush_cache") + 1)}
    engine.release()
    assert (server.released, server.deaths, engine.pool.up()) == (set(), 0, [])


def test_a_new_trainer_finds_servers_as_the_old_one_left_them(servers, make_engine):
    left, broke_off, fresh = servers(3)
    engine = make_engine([left, broke_off])
    engine.load(weights(), 7)
    engine.release()
    broke_off.broken = {(UPDATE, broke_off.paths.count(UPDATE) + 1)}
    with pytest.raises(Down):
        make_engine([broke_off]).load(weights(), 8)
    assert (left.version, broke_off.version) == ("released", "without-cache")
    again = make_engine([left, broke_off, fresh])
    again.load(weights(), 8)
    assert len(again.pool.up()) == 3
    assert versions(again.generate(PROMPTS, SAMPLING)) == {8}
    assert [server.deaths for server in (left, broke_off, fresh)] == [0, 0, 0]


def test_a_server_that_starts_anew_while_the_student_trains_gives_its_memory_back_too(servers, make_engine):
    died, other = servers(2)
    engine = make_engine([died, other])
    engine.load(weights(), 1)
    died.kill()
    engine.release()
    died.version = "default"
    died.start()
    wait_for(lambda: died.released == set(KINDS))
    assert [client.url for client in engine.pool.up()] == [other.url]
    engine.load(weights(), 2)
    assert len(engine.pool.up()) == 2
    assert died.deaths == other.deaths == 0


def test_one_replica_speaks_for_all(servers, make_engine):
    (server,) = servers(1)
    following = make_engine([server], sync=Follow())
    following.release()
    assert server.paths == []


def alone(**settings_of_servers):
    """(settings, parallel) of one rank."""
    rollout = RolloutConfig(engine="sglang", servers=settings(**settings_of_servers))
    return rollout, SimpleNamespace(share_world=lambda compute: compute())


def test_servers_are_gone_before_the_first_model_is_loaded(servers, make_engine):
    dead, *up = servers(3)
    dead.kill()
    for _ in range(2):  # the second time as after a restart of the ranks
        colocated.clear_for_ranks(*alone(servers=[dead, *up], colocated=True))
        assert [server.released for server in up] == [set(KINDS)] * 2
    engine = make_engine(up)
    engine.load(weights(), 0)
    assert versions(engine.generate(PROMPTS, SAMPLING)) == {0}
    (elsewhere,) = servers(1)
    colocated.clear_for_ranks(*alone(servers=[elsewhere]))
    assert elsewhere.paths == []


def test_a_server_that_cannot_give_memory_back_is_refused(servers, monkeypatch):
    (server,) = servers(1)
    monkeypatch.setattr(colocated.torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"colocated: the server .* was started without --enable-memory-saver"):
        colocated.clear_for_ranks(*alone(servers=[server], colocated=True))
