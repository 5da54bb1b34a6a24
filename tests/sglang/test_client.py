"""The client against the stand-in: what is sent, what is believed, and what is refused before it is sent."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from standin import settings
from standin_faults import AFTER, BEFORE
from standin_model import CONTEXT, END, VOCAB_SIZE, cut, hidden, logps

from megatron_opd.core.scores import Hidden, Sampled, TopK
from megatron_opd.sglang.client import ADMIN_KEY, API_KEY, Client
from megatron_opd.sglang.errors import BadAnswer, Down, Refused, SGLangError
from megatron_opd.sglang.wire import Ask, Draw, Drawn, ServerLimits, draw_body

PROMPT = (5, 6, 7, 8)
RESPONSE = (9, 10, 11, 12, 13)
DRAW = Draw(rid="r", ids=PROMPT, max_new_tokens=8, temperature=1.0, stop_ids=(END,), seed=3)
ASK = Ask(rid="r", ids=PROMPT + RESPONSE, first=len(PROMPT), carrier="sampled")


def expected(draw, ids):
    """Log-probabilities of a drawn answer, after temperature, top-p and top-k; greedy ones are of all tokens."""
    bias = dict.fromkeys(draw.banned_ids, -1e4)
    rows = [logps(draw.ids + ids[:r], temperature=draw.temperature, bias=bias) for r in range(len(ids))]
    if draw.temperature > 0 and (draw.top_p < 1 or draw.top_k > 0):
        rows = [cut(row, draw.top_p, draw.top_k) for row in rows]
    return [row[i] for row, i in zip(rows, ids, strict=True)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 0.0},
        {"top_p": 0.7},
        {"top_k": 3, "temperature": 2.0},
        {"top_p": 0.6, "top_k": 4},
        {"temperature": 0.0, "top_p": 0.5},
        {"banned_ids": tuple(range(20, 40))},
    ],
)
def test_samples_with_behaviour_log_probabilities(client, loop, changes):
    for seed in range(5):
        draw = replace(DRAW, seed=seed, **changes)
        drawn = loop.run(client[0].generate(draw), 10)
        assert drawn.logps == pytest.approx(expected(draw, drawn.ids), abs=1e-6)
        assert drawn.versions == (0,) * len(drawn.ids)
        assert drawn.finish == ("stop" if drawn.ids[-1] == END else "length")
        assert len(drawn.ids) == 8 or drawn.finish == "stop"
        assert not set(drawn.ids) & set(draw.banned_ids)


def test_scores_the_sampled_tokens(client, loop):
    score = loop.run(client[0].score(ASK), 10)
    assert isinstance(score, Sampled)
    right = [logps(ASK.ids[:i])[ASK.ids[i]] for i in range(ASK.first, len(ASK.ids))]
    torch.testing.assert_close(score.logp_R, torch.tensor(right, dtype=torch.float32))


@pytest.mark.parametrize("k", [1, 3, VOCAB_SIZE])
def test_scores_the_top_k_with_the_sampled_token_among_them(client, loop, k):
    score = loop.run(client[0].score(replace(ASK, carrier="topk", top_k=k)), 10)
    assert isinstance(score, TopK)
    assert score.ids_RK.shape == score.logp_RK.shape == (len(RESPONSE), k)
    assert score.ids_RK.dtype == torch.int64
    for r, token in enumerate(RESPONSE):
        row = logps(PROMPT + RESPONSE[:r])
        top = np.argsort(-row)[:k].tolist()
        assert set(score.ids_RK[r].tolist()) == set(top if token in top else [*top[:-1], token])
        np.testing.assert_allclose(score.logp_RK[r], row[score.ids_RK[r]], rtol=1e-6)


@pytest.mark.parametrize("cached", [0, 2, len(PROMPT) - 1, len(PROMPT) + 3])
def test_hidden_states_whatever_the_server_has_cached(servers, loop, make_pool, cached):
    client = make_pool(servers(1, cached=cached)).up()[0]
    score = loop.run(client.score(replace(ASK, carrier="hidden")), 10)
    assert isinstance(score, Hidden)
    right = np.stack([hidden(ASK.ids[:i]) for i in range(ASK.first, len(ASK.ids))])
    np.testing.assert_array_equal(score.hidden_RD, right)


BAD_DRAWS = {
    "ids must lie": {"ids": (1, VOCAB_SIZE)},
    "ids must lie in": {"ids": (-1,)},
    "prompt must not be empty": {"ids": ()},
    "need more than 64": {"max_new_tokens": CONTEXT},
    "SGLang keeps": {"ids": (1,) * (CONTEXT - 6), "max_new_tokens": 1},
    "max_new_tokens must": {"max_new_tokens": 0},
    "temperature must": {"temperature": math.nan},
    "temperature must be finite": {"temperature": math.inf},
    "not negative": {"temperature": -1.0},
    "top_p": {"top_p": 0.0},
    "top_k": {"top_k": VOCAB_SIZE + 1},
    "stop_ids": {"stop_ids": (VOCAB_SIZE,)},
    "banned_ids": {"banned_ids": (VOCAB_SIZE,)},
}
BAD_ASKS = {
    "ids must lie": {"ids": (*PROMPT, 1000)},
    "nothing before": {"first": 0},
    "nothing after": {"first": len(ASK.ids)},
    "top_k": {"carrier": "topk", "top_k": VOCAB_SIZE + 1},
    "top_k must": {"carrier": "topk", "top_k": 0},
    "need more than": {"ids": (1,) * CONTEXT},
}


@pytest.mark.parametrize(("said", "changes"), BAD_DRAWS.items())
def test_what_kills_a_server_is_not_sent(client, loop, said, changes):
    with pytest.raises(Refused, match=f"not sent: .*{said}"):
        loop.run(client[0].generate(replace(DRAW, **changes)), 10)
    assert client[1].paths == []


@pytest.mark.parametrize(("said", "changes"), BAD_ASKS.items())
def test_no_score_is_asked_that_kills_a_server(client, loop, said, changes):
    with pytest.raises(Refused, match=f"not sent: .*{said}"):
        loop.run(client[0].score(replace(ASK, **changes)), 10)
    assert client[1].paths == []


OF_SCORES = {"short_top", "no_base64", "odd_shape", "ragged_hidden", "few_hidden", "decoded_hidden"}
OF_BOTH = {"short", "wrong_ids", "nan", "null", "positive", "text", "no_meta"}


@pytest.mark.parametrize("fault", sorted(AFTER.keys() - OF_SCORES))
def test_bad_answers_are_not_believed(client, loop, fault):
    client[1].faults = [fault]
    with pytest.raises(BadAnswer, match=client[1].url):
        loop.run(client[0].generate(DRAW), 10)
    loop.run(client[0].generate(DRAW), 10)


@pytest.mark.parametrize(
    ("carrier", "fault"),
    [
        *(("sampled", fault) for fault in sorted(OF_BOTH)),
        *(("topk", fault) for fault in ["short_top", "no_base64", "odd_shape", "wrong_ids", "short"]),
        *(("hidden", fault) for fault in ["ragged_hidden", "few_hidden", "decoded_hidden", "no_meta"]),
    ],
)
def test_bad_scores_are_not_believed(client, loop, carrier, fault):
    client[1].faults = [fault]
    ask = replace(ASK, carrier=carrier, top_k=3)
    with pytest.raises(BadAnswer, match=client[1].url):
        loop.run(client[0].score(ask), 10)
    loop.run(client[0].score(ask), 10)


KINDS = {"drop": Down, "die": Down, "hang": Down, "error": Down, "full": Down, "garbage": BadAnswer, "half": BadAnswer,
         "empty": BadAnswer, "long": Down}  # fmt: skip


@pytest.mark.parametrize("fault", sorted(BEFORE))
def test_failures_by_kind(servers, loop, make_pool, fault):
    (server,) = servers(1)
    client = make_pool([server], request_timeout_s=0.3 if fault == "hang" else 60.0).up()[0]
    server.faults = [fault]
    with pytest.raises(KINDS[fault], match=server.url):
        loop.run(client.generate(DRAW), 10)


def test_nobody_listens(servers, loop, make_pool):
    (server,) = servers(1)
    server.kill()
    with pytest.raises(Down, match="ClientConnectorError"):
        loop.run(make_pool([server]).up()[0].generate(DRAW), 10)


def test_the_servers_own_words_are_passed_on(client, loop):
    with pytest.raises(Refused, match=r"400.*begin_weight_update"):
        loop.run(client[0].post("/update_weights_from_tensor", {"serialized_named_tensors": []}), 10)
    with pytest.raises(Refused, match="404"):
        loop.run(client[0].post("/get_weight_version", {}), 10)


def test_a_server_that_ends_answers_at_other_tokens_is_refused(client, loop):
    draws = [replace(DRAW, stop_ids=(39,), seed=seed, max_new_tokens=50) for seed in range(40)]

    async def answer_all():
        for draw in draws:
            await client[0].generate(draw)

    with pytest.raises(Refused, match=f"ends an answer at token {END}.*generation_config"):
        loop.run(answer_all(), 10)


def test_control(client, loop):
    client, server = client
    loop.run(client.health(), 10)
    assert loop.run(client.model_info(), 10)["weight_version"] == "0"
    loop.run(client.pause("retract"), 10)
    with pytest.raises(Down):
        loop.run(client.health(), 10)
    loop.run(client.flush(), 10)
    loop.run(client.begin_weight_update(), 10)
    loop.run(client.post("/update_weights_from_tensor", {"weight_version": "4"}), 10)
    loop.run(client.end_weight_update(), 10)
    with pytest.raises(Refused):
        loop.run(client.end_weight_update(), 10)
    loop.run(client.resume(), 10)
    assert loop.run(client.checksums(), 10)["ranks"]
    assert loop.run(client.generate(DRAW), 10).versions[0] == 4
    assert server.paths[-1] == "/generate"


def test_flush_while_busy_is_refused(servers, loop, make_pool):
    (server,) = servers(1, token_s=0.5)
    client = make_pool([server]).up()[0]
    answer = loop.start(client.generate(replace(DRAW, temperature=0.0, max_new_tokens=20)))
    while not server.running:
        pass
    with pytest.raises(Refused, match="running or waiting"):
        loop.run(client.flush(timeout_s=0.0), 10)
    loop.run(client.abort("r"), 10)
    drawn = answer.result(120)
    assert drawn.finish == "abort"
    assert drawn.logps == pytest.approx(expected(replace(DRAW, temperature=0.0), drawn.ids), abs=1e-6)


def test_aborted_before_the_first_token(servers, loop, make_pool):
    (server,) = servers(1)
    server.abort_after = 0
    assert loop.run(make_pool([server]).up()[0].generate(DRAW), 10) == Drawn((), (), (), "abort")


def test_a_pause_comes_through_when_all_requests_wait(servers, loop, make_pool):
    (server,) = servers(1, token_s=0.02)
    client = make_pool([server], max_in_flight=2).up()[0]
    answers = [loop.start(client.generate(replace(DRAW, rid=str(i), seed=i))) for i in range(6)]
    while len(server.running) < 2:
        pass
    loop.run(client.pause("retract"), 2)
    assert len(server.running) == 2  # the others wait here
    loop.run(client.resume(), 2)
    assert len({answer.result(120).ids for answer in answers}) > 1


def test_keys_come_from_the_environment_and_stay_out_of_messages(servers, loop, monkeypatch):
    (server,) = servers(1, api_key="sesame", admin_key="open")
    client = Client(server.url, settings([server]), vocab_size=VOCAB_SIZE, context=CONTEXT)
    for key, admin_key in [("", ""), ("wrong-key", "open"), ("wrong-key", "")]:
        monkeypatch.setenv(API_KEY, key)
        monkeypatch.setenv(ADMIN_KEY, admin_key)
        with pytest.raises(Refused, match="401") as refused:
            loop.run(client.generate(DRAW), 10)
        assert "wrong-key" not in str(refused.value)
    monkeypatch.setenv(API_KEY, "sesame")
    with pytest.raises(Refused, match="401"):
        loop.run(client.pause("retract"), 10)
    monkeypatch.setenv(ADMIN_KEY, "open")
    loop.run(client.generate(DRAW), 10)
    loop.run(client.model_info(), 10)
    loop.run(client.pause("retract"), 10)
    monkeypatch.delenv(ADMIN_KEY)
    server.admin_key = ""
    loop.run(client.resume(), 10)
    loop.run(client.close(), 10)


def test_loop_time_out_cancels_and_errors_come_through(loop):
    import asyncio

    ended = []

    async def slow():
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(True)

    with pytest.raises(TimeoutError):
        loop.run(slow(), 0.05)
    while not ended:
        pass

    async def fails():
        raise SGLangError("no")

    with pytest.raises(SGLangError, match="no"):
        loop.run(fails(), 5)


@pytest.mark.parametrize(
    ("changes", "top_k", "is_asked"),
    [
        ({}, -1, False),
        ({"top_k": 3}, 3, True),
        ({"top_p": 0.5}, VOCAB_SIZE, True),
        ({"top_p": 0.5, "top_k": 3}, 3, True),
        ({"temperature": 0.0, "top_k": 3}, 3, False),
        ({"temperature": 0.0, "top_p": 0.5}, -1, False),
    ],
    ids=str,
)
def test_servers_are_asked_for_the_distribution_that_was_cut(changes, top_k, is_asked):
    body = draw_body(replace(DRAW, **changes), ServerLimits(vocab_size=VOCAB_SIZE, context=CONTEXT))
    assert body["sampling_params"]["top_k"] == top_k
    assert body.get("return_sampling_mask", False) == is_asked
    assert body.get("sampling_logprobs_mode") == ("selected" if is_asked else None)
