"""Rollouts over stand-ins: what they are, whatever happens to servers on the way, and how new weights arrive."""

import threading
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from standin import wait_for
from standin_model import END, VOCAB_SIZE, cut, logps

from megatron_opd.core.types import Prompt, Sampling
from megatron_opd.rollout.served_engine import SGLangEngine
from megatron_opd.sglang.errors import BadAnswer, Down, Refused
from megatron_opd.sglang.follow import Follow
from megatron_opd.sglang.wire import Draw, Drawn

PROMPTS = [Prompt(source="a", index=i, text="", token_ids=tuple(range(3, 5 + i))) for i in range(6)]
SAMPLING = Sampling(max_new_tokens=12, temperature=1.0, samples_per_prompt=3, seed=7)


class Push:
    """A WeightSync that only moves versions. `failing` are urls that a push does not reach."""

    def __init__(self, loop):
        self.loop, self.version, self.failing, self.given = loop, 0, set(), []

    def push(self, clients, weights, version):
        self.seen = list(weights)
        self.version, failed = version, {}
        for client in clients:
            try:
                if client.url in self.failing:
                    raise Down("cut off in the middle")
                self.loop.run(self._move(client), 10)
            except Down as error:
                failed[client.url] = error
        return failed

    async def _move(self, client):
        await client.pause("retract")
        await client.post("/update_weight_version", {"new_version": str(self.version)})
        await client.resume()

    async def give(self, client):
        await self._move(client)
        self.given.append(client.url)

    def close(self):
        pass


@pytest.fixture
def make_engine(loop, make_pool):
    """An engine over stand-ins. `sync` is its WeightSync; settings of servers and of the engine by name."""

    def make(servers, *, sync=None, partial=False, vocab_size=VOCAB_SIZE, lag=0, **changes):
        sync = sync or Push(loop)
        pool = make_pool(servers, on_return=sync.give, **changes)
        return SGLangEngine(pool, loop, sync, eos_ids=(END,), vocab_size=vocab_size, partial=partial, lag=lag)

    return make


def assert_right(rollouts, sampling=SAMPLING, prompts=PROMPTS):
    """In order, complete, ended rightly, and with the log-probabilities of the model that sampled."""
    wanted = [(prompt, sample) for prompt in prompts for sample in range(sampling.samples_per_prompt)]
    assert [(r.prompt, r.sample) for r in rollouts] == wanted
    for rollout in rollouts:
        ids = rollout.token_ids
        assert END not in ids[:-1]
        assert rollout.finish == ("stop" if ids[-1] == END else "length")
        assert len(ids) == sampling.max_new_tokens or rollout.finish == "stop"
        before = [rollout.prompt.token_ids + ids[:r] for r in range(len(ids))]
        rows = [logps(b, temperature=sampling.temperature) for b in before]
        if sampling.top_p < 1 or sampling.top_k:
            rows = [cut(row, sampling.top_p, sampling.top_k) for row in rows]
        np.testing.assert_allclose(rollout.logps, [row[i] for row, i in zip(rows, ids, strict=True)], atol=1e-6)
        assert len(rollout.versions) == len(ids)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 0.0, "samples_per_prompt": 1},
        {"temperature": 1.3, "top_p": 0.8, "top_k": 5},
        {"max_new_tokens": 1},
    ],
)
def test_rollouts(servers, make_engine, changes):
    sampling = replace(SAMPLING, **changes)
    engine = make_engine(servers(2))
    finished = []
    rollouts = engine.generate(PROMPTS, sampling, finished.append)
    assert_right(rollouts, sampling)
    assert sorted(finished, key=rollouts.index) == rollouts
    assert rollouts == make_engine(servers(1)).generate(PROMPTS, sampling)  # which server does not matter
    if sampling.temperature and sampling.max_new_tokens > 1:
        assert len({r.token_ids for r in rollouts}) > 2 * len(PROMPTS)
    assert engine.generate([], sampling) == []


def test_a_prompt_that_is_drawn_again_gets_other_answers(servers, make_engine):
    thrice = [replace(PROMPTS[0], repeat=n) for n in range(3)]
    engine = make_engine(servers(2))
    rollouts = engine.generate(thrice, SAMPLING)
    assert_right(rollouts, prompts=thrice)
    assert len({r.token_ids for r in rollouts}) == len(rollouts)
    assert rollouts[: SAMPLING.samples_per_prompt] == engine.generate(PROMPTS[:1], SAMPLING)


def test_finished_rollouts_are_told_at_once(servers, make_engine):
    (server,) = servers(1, token_s=0.03)
    told = []
    engine = make_engine([server])
    rollouts = engine.generate(PROMPTS, SAMPLING, told.append)
    shortest, longest = (pick(rollouts, key=lambda r: len(r.token_ids)) for pick in (min, max))
    assert len(shortest.token_ids) < len(longest.token_ids)
    assert told.index(shortest) < told.index(longest)
    assert told != rollouts  # their order is that of their ends


def test_only_ids_that_every_model_has_are_sampled(servers, make_engine):
    rollouts = make_engine(servers(1), vocab_size=20).generate(PROMPTS, SAMPLING)
    assert max(max(r.token_ids) for r in rollouts) == 19
    for r in rollouts:
        bias = dict.fromkeys(range(20, VOCAB_SIZE), -1e4)
        first = logps(r.prompt.token_ids, bias=bias)[r.token_ids[0]]
        assert r.logps[0] == pytest.approx(first)


def test_a_vocabulary_that_is_far_too_large_is_refused(servers, make_engine):
    engine = make_engine(servers(1))
    client = engine.pool.clients[0]
    client.limits = replace(client.limits, vocab_size=100_000)
    with pytest.raises(ValueError, match="100000 entries"):
        SGLangEngine(engine.pool, engine.loop, engine.sync, eos_ids=(END,), vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("partial", [False, True])
def test_aborted_answers_are_continued_or_begun_again(servers, loop, make_engine, partial):
    (server,) = servers(1, token_s=0.02)
    engine = make_engine([server], partial=partial)
    undisturbed = engine.generate(PROMPTS, SAMPLING)
    server.seen.clear()
    client = engine.pool.clients[0]
    started = loop.start(engine._all(PROMPTS, SAMPLING, lambda _: None))
    wait_for(lambda: any(len(run.ids) >= 3 for run in list(server.running.values())))
    loop.run(client.pause("abort"), 10)
    loop.run(client.post("/update_weight_version", {"new_version": "1"}), 10)
    wait_for(lambda: len(server.seen) > len(PROMPTS) * 3)  # what was aborted waits again
    loop.run(client.resume(), 10)
    rollouts = started.result(20)
    assert_right(rollouts)
    # Sampling in the stand-in depends on the position alone, so an interrupted answer is the same answer.
    assert [r.token_ids for r in rollouts] == [r.token_ids for r in undisturbed]
    mixed = [r for r in rollouts if set(r.versions) == {0, 1}]
    assert all(list(r.versions) == sorted(r.versions) for r in rollouts)
    counted = engine.metrics()
    assert counted["rollout/aborts"] > 0
    longer = [body for body in server.seen if body["input_ids"] not in [list(p.token_ids) for p in PROMPTS]]
    if partial:
        assert mixed
        assert counted["rollout/tokens_kept"] == sum(r.versions.count(0) for r in mixed)
        assert all(body["sampling_params"]["max_new_tokens"] < 12 for body in longer)
        assert longer
    else:
        assert not mixed
        assert not longer
        assert "rollout/tokens_kept" not in counted


def test_answers_that_are_aborted_for_ever_are_given_up(servers, loop, make_engine):
    (server,) = servers(1)
    engine = make_engine([server])
    answer = server._answer

    async def aborted(body):
        said = await answer(body)
        said["output_ids"] = []
        said["meta_info"]["finish_reason"] = {"type": "abort", "message": "Abort in waiting queue"}
        return said

    server._answer = aborted
    with pytest.raises(Down, match="aborted 65 times"):
        engine.generate(PROMPTS[:1], replace(SAMPLING, samples_per_prompt=1))


@pytest.mark.parametrize(("partial", "tokens"), [(False, 0), (False, 2), (True, 0)])
def test_a_server_that_only_aborts_leaves_the_work_to_the_others(servers, loop, make_engine, partial, tokens):
    broken, sound = servers(2)
    broken.abort_after = tokens
    engine = make_engine([broken, sound], partial=partial, probe_s=60)
    rollouts = loop.run(engine._all(PROMPTS, SAMPLING, lambda _: None), 20)
    assert_right(rollouts)
    assert engine.metrics()["rollout/servers_down"] == 1


def test_versions_by_token_when_weights_arrive_in_the_middle(servers, loop, make_engine):
    (server,) = servers(1, token_s=0.02)
    engine = make_engine([server], partial=True)
    started = loop.start(engine._all(PROMPTS, SAMPLING, lambda _: None))
    wait_for(lambda: any(len(run.ids) >= 3 for run in list(server.running.values())))
    engine.load(iter([("w", torch.zeros(1))]), 1)
    rollouts = started.result(20)
    assert_right(rollouts)
    assert any(set(r.versions) == {0, 1} for r in rollouts)
    later = engine.generate(PROMPTS, SAMPLING)
    assert {v for r in later for v in r.versions} == {1}


def test_load_runs_the_weights_to_their_end_and_leaves_out_who_failed(servers, make_engine):
    first, second = servers(2)
    engine = make_engine([first, second], probe_s=0.3)
    engine.sync.failing = {first.url}
    engine.load(iter([("a", torch.zeros(1)), ("b", torch.zeros(1))]), 4)
    assert [name for name, _ in engine.sync.seen] == ["a", "b"]
    assert [client.url for client in engine.pool.up()] == [second.url]
    rollouts = engine.generate(PROMPTS, SAMPLING)
    assert {v for r in rollouts for v in r.versions} == {4}
    assert first.seen == []
    wait_for(lambda: len(engine.pool.up()) == 2)  # it answers, and `give` brought it to version 4
    assert engine.sync.given == [first.url]
    engine.generate(PROMPTS, SAMPLING)
    assert first.seen


def test_a_server_that_came_back_gets_work_with_the_next_weights(servers, make_engine):
    first, second = servers(2)
    engine = make_engine([first, second], probe_s=60.0)
    first.kill()
    engine.load(iter([]), 1)
    assert len(engine.pool.up()) == 1
    first.start()
    engine.load(iter([]), 2)
    assert len(engine.pool.up()) == 2
    assert engine.metrics()["rollout/returns"] == 1


def test_old_weights_are_not_sampled_with(servers, make_engine):
    """A server that restarted between two looks at it serves what it started with."""
    first, second = servers(2)
    engine = make_engine([first, second], probe_s=60.0)
    engine.load(iter([]), 3)
    first.version = "2"
    rollouts = engine.generate(PROMPTS, SAMPLING)
    assert_right(rollouts)
    assert {v for r in rollouts for v in r.versions} == {3}
    assert [client.url for client in engine.pool.up()] == [second.url]


def test_a_replica_that_does_not_push(servers, loop, make_engine):
    both = servers(2)
    pushing = make_engine(both)
    following = make_engine(both, sync=Follow(), probe_s=0.05)
    gathered = iter([("a", torch.zeros(1))])
    following.load(gathered, 5)
    assert list(gathered) == []
    for server in both:
        server.faults = ["drop"]  # both get lost
    with pytest.raises(Down):
        following.generate(PROMPTS, replace(SAMPLING, samples_per_prompt=1))
    time.sleep(0.3)
    assert following.pool.up() == []  # they answer, but not with version 5
    pushing.load(iter([]), 5)
    wait_for(lambda: len(following.pool.up()) == 2)
    assert {v for r in following.generate(PROMPTS, SAMPLING) for v in r.versions} == {5}


def test_a_following_replica_may_meet_the_version_before(servers, make_engine):
    engine = make_engine(servers(1), sync=Follow(), lag=1, retries=0)
    engine.load(iter([]), 1)
    engine.generate(PROMPTS, SAMPLING)
    engine.load(iter([]), 2)
    with pytest.raises(Down, match="weights 0, which 1 has replaced"):
        engine.generate(PROMPTS, SAMPLING)


def test_several_batches_at_once(servers, make_engine):
    """As with rollout.max_staleness: from several threads, and none gets what is another's."""
    engine = make_engine(servers(2, token_s=0.005))
    results = {}
    samplings = [replace(SAMPLING, seed=seed) for seed in range(3)]
    threads = [
        threading.Thread(target=lambda s=s: results.update({s.seed: engine.generate(PROMPTS, s)})) for s in samplings
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for sampling in samplings:
        assert results[sampling.seed] == engine.generate(PROMPTS, sampling)


@pytest.mark.parametrize("fault", ["die", "hang", "garbage", "short", "wrong_ids", "error"])
@pytest.mark.parametrize("partial", [False, True])
def test_a_server_lost_in_the_middle_costs_no_answer(servers, make_engine, fault, partial):
    bad, good = servers(2, token_s=0.003)
    engine = make_engine([bad, good], partial=partial, request_timeout_s=3.0 if fault == "hang" else 60.0, probe_s=60.0)
    undisturbed = make_engine([good]).generate(PROMPTS, SAMPLING)
    bad.faults = [None, None, None, fault]
    if fault == "hang":
        bad.always = "hang"
    finished = []
    rollouts = engine.generate(PROMPTS, SAMPLING, finished.append)
    assert rollouts == undisturbed
    assert Counter(finished) == Counter(rollouts)  # each once
    assert [client.url for client in engine.pool.up()] == [good.url]
    counted = engine.metrics()
    assert counted["rollout/retries"] >= 1
    assert counted["rollout/losses"] == counted["rollout/servers_down"] == 1


def test_none_left(servers, make_engine):
    both = servers(2)
    engine = make_engine(both, retries=1)
    for server in both:
        server.kill()
    with pytest.raises(Down, match=both[1].url):
        engine.generate(PROMPTS, SAMPLING)


def test_a_refused_request_ends_the_batch(servers, make_engine):
    (server,) = servers(1, api_key="sesame")
    with pytest.raises(Refused, match="401"):
        make_engine([server]).generate(PROMPTS, SAMPLING)


def test_an_error_in_the_caller_s_function_is_the_caller_s(servers, make_engine):
    def fails(rollout):
        raise KeyError("oops")

    with pytest.raises(KeyError, match="oops"):
        make_engine(servers(1)).generate(PROMPTS, SAMPLING, fails)


def test_servers_that_keep_their_weights_need_no_version_of_ours(servers, loop, make_pool):
    """A teacher that samples: nobody has told its servers a version, and nobody will."""
    with_none = servers(2, version="default")
    engine = SGLangEngine(make_pool(with_none), loop, None, eos_ids=(END,), vocab_size=VOCAB_SIZE)
    rollouts = engine.generate(PROMPTS, SAMPLING)
    assert_right(rollouts)
    assert {v for rollout in rollouts for v in rollout.versions} == {0}


@pytest.mark.parametrize("versions", [(2, 3, 3), (3, 2), (2, 2)])
def test_not_even_a_token_of_weights_that_were_replaced_is_accepted(loop, versions):
    """Each of the answer's tokens counts, and what was replaced when the request was sent."""
    ids = tuple(range(3, 3 + len(versions)))

    async def generate(draw):
        return Drawn(ids, (-1.0,) * len(ids), versions, "length")

    async def run(work, **_):
        return await work(client, "r")

    client = SimpleNamespace(url="there", limits=SimpleNamespace(vocab_size=VOCAB_SIZE), generate=generate)
    engine = SGLangEngine(
        SimpleNamespace(clients=[client], run=run), loop, Push(loop), eos_ids=(END,), vocab_size=VOCAB_SIZE
    )
    draw = Draw(rid="", ids=(3, 4), max_new_tokens=len(ids), temperature=1.0)
    engine.oldest = 3
    with pytest.raises(BadAnswer, match="sampled with weights 2, which 3 has replaced"):
        loop.run(engine._draw(draw, None, 0))
    engine.oldest = 2
    assert loop.run(engine._draw(draw, None, 0)).versions == versions
