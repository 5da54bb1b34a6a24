"""Servers that are up and not able: their health is fine, and requests fail. The others do the work."""

import asyncio
import threading

import pytest
from standin import settings, wait_for
from standin_model import END, VOCAB_SIZE
from test_served_rollouts import PROMPTS as ROLLOUT_PROMPTS
from test_served_rollouts import SAMPLING, Push, make_engine  # noqa: F401
from test_served_teachers import ROLLOUTS, assert_right, make_teacher  # noqa: F401

from megatron_opd.config import RolloutConfig
from megatron_opd.rollout.served_engine import SGLangEngine
from megatron_opd.sglang.errors import Down
from megatron_opd.sglang.pool import ServerGroup
from megatron_opd.sglang.weights.sync import WeightPush
from megatron_opd.sglang.wire import Draw

KINDS = ["error", "long", "garbage", "empty", "hang", "drop", "two", "short", "full"]
PROMPT = (4, 5, 6, 7, 8)


async def ask(pool, number):
    """`number` requests, two of a group."""
    groups = [ServerGroup() for _ in range(number)]

    def draw(seed):
        settings = {"max_new_tokens": 6, "temperature": 1.0, "stop_ids": (END,), "seed": seed}
        return lambda client, rid: client.generate(Draw(rid=rid, ids=PROMPT, **settings))

    return await asyncio.gather(*(pool.run(draw(i), group=groups[i // 2], tokens=9) for i in range(number)))


async def mark_down(pool, client):
    pool.mark_down(client, Down("gone"))


def quick(kind):
    return {"request_timeout_s": 2.0 if kind == "hang" else 60.0, "retries": 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "bad"), [(2, 1), (3, 1), (3, 2)])
def test_requests_go_to_those_that_are_able(servers, loop, make_pool, kind, count, bad):
    """However soon the others are looked at again, and with fewer retries than there are such servers."""
    started = servers(count)
    alone = loop.run(ask(make_pool(started[-1:]), 8), 20)
    for server in started[:bad]:
        server.always = kind
    pool = make_pool(started, probe_s=0.001, **quick(kind))
    for _ in range(1 if kind == "hang" else 4):
        assert loop.run(ask(pool, 8), 40) == alone
    counted = pool.metrics()
    assert counted["losses"] >= bad
    if kind != "long":  # whose small requests are answered
        assert "returns" not in counted
        assert [client.url for client in pool.up()] == [server.url for server in started[bad:]]


@pytest.mark.parametrize("kind", ["error", "garbage", "empty", "drop", "two"])
def test_when_none_is_able_each_is_named_with_its_last_error(servers, loop, make_pool, kind):
    started = servers(3)
    for server in started:
        server.always = kind
    pool = make_pool(started, probe_s=0.001, patience_s=0.2, retries=1)
    with pytest.raises(Down) as down:
        loop.run(ask(pool, 2), 40)
    said = str(down.value).splitlines()
    assert len(said) == 4
    for server in started:
        (of_it,) = [line for line in said[1:] if server.url in line.split()[0]]
        assert of_it.count(server.url) == 2, of_it  # the second is the error's
        assert not of_it.endswith(": up")


def test_a_server_that_fails_some_requests_is_named_with_its_error_although_it_is_up(servers, loop, make_pool):
    (server,) = servers(1)
    server.always = "long"
    pool = make_pool([server], probe_s=0.001, retries=2)
    with pytest.raises(Down, match="failed 3 times") as down:
        loop.run(ask(pool, 1), 40)
    assert "/generate: 500" in str(down.value).splitlines()[-1]


def test_a_server_that_fails_again_and_again_is_left_alone_for_longer(servers, loop, make_pool):
    bad, good = servers(2)
    bad.always = "long"
    pool = make_pool([bad, good], probe_s=0.001)
    server = pool._servers[0]
    for strikes in range(1, 6):
        wait_for(lambda: len(pool.up()) == 2)
        loop.run(ask(pool, 2), 40)
        assert server.strikes == strikes
    bad.always = None
    wait_for(lambda: len(pool.up()) == 2)
    loop.run(ask(pool, 2), 40)
    assert server.strikes == 0


def test_a_server_is_able_again_once_it_has_answered(servers, loop, make_pool):
    bad, good = servers(2)
    bad.always = "error"
    pool = make_pool([bad, good])
    loop.run(ask(pool, 4), 40)
    wait_for(lambda: sum(len(body["input_ids"]) == 1 for body in bad.seen) >= 3)
    assert len(pool.up()) == 1
    bad.always = None
    wait_for(lambda: len(pool.up()) == 2)


@pytest.mark.parametrize("kind", ["error", "garbage", "two", "drop"])
def test_new_weights_do_not_make_a_server_able(servers, loop, make_engine, kind):  # noqa: F811
    bad, good = servers(2)
    engine = make_engine([bad, good], probe_s=0.001, retries=1)
    engine.load(iter([]), 0)
    alone = engine.generate(ROLLOUT_PROMPTS, SAMPLING)
    bad.always = kind
    for version in (1, 2, 3):
        engine.load(iter([]), version)
        drawn = engine.generate(ROLLOUT_PROMPTS, SAMPLING)
        assert [one.token_ids for one in drawn] == [one.token_ids for one in alone]
        assert {v for one in drawn for v in one.versions} == {version}
        assert [client.url for client in engine.pool.up()] == [good.url]
    bad.always = None
    engine.load(iter([]), 4)
    wait_for(lambda: len(engine.pool.up()) == 2)


def test_a_look_that_fails_after_another_let_the_server_in_changes_nothing(servers, loop, make_pool, monkeypatch):
    """Both ways round: a push's look and the pool's own run side by side, and whoever fails last does not decide."""
    (server,) = servers(1)
    pool = make_pool([server])
    (client,) = pool.clients

    async def fails_late(*_):
        pool._let_in(pool._servers[0])
        raise Down("too slow")

    for method in ("prove", "health"):
        monkeypatch.setattr(client, method, fails_late)
        loop.run(mark_down(pool, client), 40)
        if method == "prove":
            loop.run(pool.take_back(client), 40)
        else:
            wait_for(lambda: not pool._tasks)
        assert pool.up() == [client]
        monkeypatch.undo()
        loop.run(ask(pool, 2), 40)


@pytest.mark.parametrize("kind", ["error", "long", "garbage", "empty", "drop", "two", "short"])
@pytest.mark.parametrize("carrier", ["sampled", "topk"])
def test_scores_come_from_the_teachers_servers_that_are_able(servers, make_teacher, kind, carrier):  # noqa: F811
    first, second, good = servers(3)
    first.always = second.always = kind
    teacher = make_teacher([first, second, good], carrier=carrier, retries=0, probe_s=0.001)
    for _ in range(3):
        assert_right(teacher.score(ROLLOUTS), ROLLOUTS, carrier=carrier)
    assert "teacher/t/unscored" not in teacher.metrics()


def test_new_weights_wait_for_the_only_server_while_it_starts_again(servers, loop, make_pool, tmp_path):
    (server,) = servers(1)

    def write(weights, directory):
        list(weights)
        directory.mkdir(parents=True)

    rollout = RolloutConfig(engine="sglang", sync="disk", servers=settings([server], patience_s=900.0))
    sync = WeightPush(rollout, loop, model="model", write=write, spool=tmp_path / "spool")
    engine = SGLangEngine(make_pool([server], on_return=sync.give), loop, sync, eos_ids=(END,), vocab_size=VOCAB_SIZE)
    engine.load(iter([]), 1)
    server.kill()
    server.version = "default"
    restart = threading.Timer(0.5, server.start)
    restart.start()
    engine.load(iter([]), 2)
    restart.join()
    assert {v for one in engine.generate(ROLLOUT_PROMPTS, SAMPLING) for v in one.versions} == {2}
