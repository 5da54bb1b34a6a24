"""The pool: who gets a request, what a failure costs, and the way back."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
from standin import wait_for
from standin_model import END

from megatron_opd.sglang.errors import Down, Refused
from megatron_opd.sglang.pool import ServerGroup
from megatron_opd.sglang.wire import Draw


def draw(client, rid, seed=0):
    ids = (4, 5, 6)
    return client.generate(Draw(rid=rid, ids=ids, max_new_tokens=6, temperature=1.0, stop_ids=(END,), seed=seed))


async def run_all(pool, *, groups, samples=1):
    """`samples` requests of each of `groups` groups, together."""
    made = [ServerGroup() for _ in range(groups)]
    runs = [
        pool.run(lambda client, rid, seed=g * samples + s: draw(client, rid, seed), group=made[g], tokens=9)
        for g in range(groups)
        for s in range(samples)
    ]
    return await asyncio.gather(*runs)


def seeds(server):
    return [body["sampling_params"]["sampling_seed"] for body in server.seen]


def test_work_is_spread_and_groups_stay_together(servers, loop, make_pool):
    both = servers(2, token_s=0.01)
    pool = make_pool(both)
    loop.run(run_all(pool, groups=6, samples=3), 20)
    assert [len(server.seen) for server in both] == [9, 9]
    for server in both:
        groups = [seed // 3 for seed in seeds(server)]
        assert all(groups.count(g) == 3 for g in groups)


def test_the_least_loaded_server_is_taken(servers, loop, make_pool):
    slow, quick = servers(2)
    slow.token_s = 0.3
    pool = make_pool([slow, quick])

    async def one_after_the_other():
        first = asyncio.ensure_future(pool.run(draw, group=ServerGroup(), tokens=100))
        await asyncio.sleep(0.05)
        for _ in range(4):
            await pool.run(draw, group=ServerGroup(), tokens=1)
        await first

    loop.run(one_after_the_other(), 20)
    assert (len(slow.seen), len(quick.seen)) == (1, 4)


def test_finished_work_is_no_load(servers, loop, make_pool):
    first, second = servers(2)
    pool = make_pool([first, second])
    for _ in range(3):  # one after the other: the first server has nothing to do each time
        loop.run(run_all(pool, groups=1), 20)
    assert (len(first.seen), len(second.seen)) == (3, 0)


@pytest.mark.parametrize("fault", ["die", "drop", "hang", "error", "full", "garbage", "half", "short", "wrong_ids"])
def test_a_request_that_fails_goes_elsewhere(servers, loop, make_pool, fault):
    bad, good = servers(2, token_s=0.005)
    pool = make_pool([bad, good], request_timeout_s=3.0 if fault == "hang" else 60.0, probe_s=60.0)
    alone = loop.run(run_all(make_pool([good]), groups=8), 20)
    good.seen.clear()
    bad.always = fault
    assert loop.run(run_all(pool, groups=8), 20) == alone  # nothing lost, nothing doubled, and in order
    assert [client.url for client in pool.up()] == [good.url]
    assert sorted(seeds(good)) == list(range(8))
    counted = pool.metrics()
    kind = "bad_answer" if fault in ("garbage", "half", "short", "wrong_ids") else "down"
    assert counted["retries"] == counted[f"failures/{kind}"] >= len(bad.seen) > 0
    assert (counted["requests"], counted["losses"], counted["servers_down"]) == (8, 1, 1)


def test_every_attempt_has_its_own_request_id_and_late_ones_are_aborted(servers, loop, make_pool):
    bad, good = servers(2)
    bad.token_s = 2.0
    pool = make_pool([bad, good], request_timeout_s=1.5)
    loop.run(run_all(pool, groups=1), 20)
    # Beside small requests that are to prove a server well; a busy machine takes several attempts.
    first, second = ([body["rid"] for body in server.seen if "-" in body["rid"]] for server in (bad, good))
    assert first
    assert second
    assert len({*first, *second}) == len(first) + len(second)
    assert len({rid.partition("-")[0] for rid in (*first, *second)}) == 1
    wait_for(lambda: not {*first} & {*bad.running})
    assert "/abort_request" in bad.paths


def test_none_left_says_which_and_why(servers, loop, make_pool):
    first, second = servers(2)
    pool = make_pool([first, second], retries=2, probe_s=60.0)
    first.kill()
    second.always = "garbage"
    with pytest.raises(Down) as down:
        loop.run(run_all(pool, groups=1), 20)
    message = str(down.value)
    assert message.startswith("student: no server is up, and none came back in 2 s")
    assert f"{first.url}: " in message
    assert "ClientConnectorError" in message
    assert f"{second.url}: " in message
    assert "not JSON" in message


def test_a_refused_request_is_not_sent_again_and_costs_no_server(servers, loop, make_pool):
    (server,) = servers(1, api_key="sesame")
    pool = make_pool([server])
    with pytest.raises(Refused, match="401"):
        loop.run(run_all(pool, groups=1), 20)
    assert len(server.paths) == 1
    assert len(pool.up()) == 1
    assert pool.metrics()["failures/refused"] == 1


def test_a_blip_of_the_only_server_is_survived(servers, loop, make_pool):
    (server,) = servers(1)
    pool = make_pool([server], retries=8)
    server.faults = ["drop", "garbage"]
    assert len(loop.run(run_all(pool, groups=3), 20)) == 3


def test_a_restart_of_the_only_server_is_waited_for(servers, loop, make_pool):
    (server,) = servers(1)
    pool = make_pool([server], retries=1, patience_s=15.0)
    server.kill()
    restart = threading.Timer(1.0, server.start)
    restart.start()
    assert len(loop.run(run_all(pool, groups=3), 20)) == 3
    restart.join()


def test_patience_is_counted_from_the_loss_not_from_each_request(servers, loop, make_pool, monkeypatch):
    (server,) = servers(1)
    pool = make_pool([server], retries=0, patience_s=3600.0)
    server.kill()
    with pytest.raises(Down, match="failed 1 times"):
        loop.run(run_all(pool, groups=1), 20)
    monkeypatch.setattr("megatron_opd.sglang.pool.time", SimpleNamespace(monotonic=lambda: time.monotonic() + 3600))
    for _ in range(5):
        with pytest.raises(Down, match="no server is up"):
            loop.run(run_all(pool, groups=1), 20)


def test_a_server_that_returns_gets_work_once_it_is_welcome(servers, loop, make_pool):
    first, second = servers(2, token_s=0.005)
    asked = []

    async def on_return(client):
        asked.append(client.url)
        if len(asked) < 3:
            raise ValueError("has no weights yet")

    pool = make_pool([first, second], on_return=on_return)
    first.kill()
    loop.run(run_all(pool, groups=4), 20)
    assert [client.url for client in pool.up()] == [second.url]
    assert asked == []
    first.start()
    wait_for(lambda: len(pool.up()) == 2)
    assert asked == [first.url] * 3
    loop.run(run_all(pool, groups=4), 20)
    assert len(first.seen) >= 2
    counted = pool.metrics()
    assert (counted["returns"], counted["servers_down"]) == (1, 0)


def test_requests_are_taken_from_an_evicted_server_at_once(servers, loop, make_pool):
    first, second = servers(2)
    first.always = "hang"
    pool = make_pool([first, second], request_timeout_s=3600.0, probe_s=60.0)
    alone = loop.run(run_all(make_pool([second]), groups=4), 20)
    running = loop.start(run_all(pool, groups=4))
    wait_for(lambda: len(first.seen) == 2)

    async def evict():
        pool.evict(pool.up()[0], ValueError("half of the new weights"))

    loop.run(evict(), 5)
    assert running.result(120) == alone
    assert len(pool.up()) == 1


def test_metrics_are_those_since_the_last_call(servers, loop, make_pool):
    (server,) = servers(1)
    pool = make_pool([server])
    drawn = loop.run(run_all(pool, groups=5), 20)
    counted = pool.metrics()
    assert counted["requests"] == counted["http/requests"] == 5
    assert counted["http/tokens"] == sum(len(d.ids) for d in drawn)
    assert counted["http/bytes_received"] > counted["http/bytes_sent"] > 0
    assert counted["http/seconds"] > 0
    assert not any(pool.metrics().values())
