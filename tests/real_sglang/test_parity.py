"""Log-probabilities of a real server against transformers, in fp32: sampling and scoring, for every family."""

import asyncio
import random

import pytest
import torch
from conftest import CONTEXT, FAMILIES, VOCAB_SIZE, log_probs, taken

from megatron_opd.sglang.client import Client
from megatron_opd.sglang.errors import Refused
from megatron_opd.sglang.wire import Ask, Draw

CLOSE = 1e-5
EOS = 2  # of config.json, which the server heeds whether it is asked to or not
PROMPTS = [tuple(random.Random(i).choices(range(3, VOCAB_SIZE), k=k)) for i, k in enumerate((1, 5, 17, 40))]


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, models, serve, connect):
    """(model in transformers, client of a server of it, its settings)."""
    model, directory = models[request.param]
    with serve(directory, name=request.param) as (server, settings):
        yield model, connect(server.url, settings), settings


def draws(loop, client, **settings):
    """[(draw, drawn)] of all prompts, asked at once."""

    async def all_of_them():
        wanted = [
            Draw(rid=f"draw-{i}", ids=p, **{"max_new_tokens": 24, "stop_ids": (EOS,), **settings})
            for i, p in enumerate(PROMPTS)
        ]
        return list(zip(wanted, await asyncio.gather(*map(client.generate, wanted)), strict=True))

    return loop.run(all_of_them(), 120)


def behaviour(model, draw, drawn, temperature):
    """[R, V]: the tempered distributions that the answer was sampled from."""
    return log_probs(model, draw.ids + drawn.ids, first=len(draw.ids), temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sampled_log_probs_are_those_of_the_tempered_distribution(served, loop, temperature):
    model, client, _ = served
    for draw, drawn in draws(loop, client, temperature=temperature):
        expected_R = taken(behaviour(model, draw, drawn, temperature), drawn.ids)
        torch.testing.assert_close(torch.tensor(drawn.logps).double(), expected_R, atol=CLOSE, rtol=0)
        assert set(drawn.versions) == {0}
        assert len(drawn.ids) == 24 or drawn.ids[-1] == EOS


def test_greedy_takes_the_likeliest_and_reports_temperature_one(served, loop):
    model, client, _ = served
    for draw, drawn in draws(loop, client, temperature=0.0):
        logp_RV = behaviour(model, draw, drawn, 1.0)
        assert tuple(logp_RV.argmax(-1).tolist()) == drawn.ids
        torch.testing.assert_close(torch.tensor(drawn.logps).double(), taken(logp_RV, drawn.ids), atol=CLOSE, rtol=0)


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 5), (0.7, 0), (0.8, 7)])
def test_cut_sampling_reports_the_distribution_that_was_sampled_from(served, loop, top_p, top_k):
    model, client, _ = served
    for draw, drawn in draws(loop, client, temperature=0.9, top_p=top_p, top_k=top_k):
        logp_RV = behaviour(model, draw, drawn, 0.9)
        ordered_RV = logp_RV.sort(-1, descending=True)
        kept_RV = ordered_RV.values.exp().cumsum(-1) - ordered_RV.values.exp() < top_p
        if top_k:
            kept_RV[:, top_k:] = False
        cut_RV = ordered_RV.values.masked_fill(~kept_RV, -torch.inf).log_softmax(-1)
        expected_R = taken(torch.zeros_like(cut_RV).scatter(-1, ordered_RV.indices, cut_RV), drawn.ids)
        assert expected_R.isfinite().all(), "a token was sampled that the cut rules out"
        torch.testing.assert_close(torch.tensor(drawn.logps).double(), expected_R, atol=CLOSE, rtol=0)


def test_an_answer_ends_with_its_stop_token_and_bans_hold(served, loop):
    _, client, _ = served
    stop_ids = (EOS, *range(3, 35))
    for _, drawn in draws(loop, client, temperature=1.0, stop_ids=stop_ids, banned_ids=tuple(range(35, 60))):
        assert not set(drawn.ids) & set(range(35, 60))
        assert not set(drawn.ids[:-1]) & set(stop_ids)
        assert (drawn.ids[-1] in stop_ids) == (drawn.finish == "stop")


def test_scored_log_probs(served, loop):
    model, client, _ = served
    ids = random.Random(9).choices(range(VOCAB_SIZE), k=150)
    for first in (1, 30, 149):
        ask = Ask(rid=f"sampled-{first}", ids=tuple(ids), first=first, carrier="sampled")
        score = loop.run(client.score(ask), 60)
        expected_R = taken(log_probs(model, ids, first=first), ids[first:])
        torch.testing.assert_close(score.logp_R.double(), expected_R, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("top_k", [1, 8, VOCAB_SIZE])
def test_top_k_is_that_of_the_whole_vocabulary_and_has_the_sampled_token(served, loop, top_k):
    model, client, _ = served
    ids = random.Random(top_k).choices(range(VOCAB_SIZE), k=60)
    ask = Ask(rid=f"topk-{top_k}", ids=tuple(ids), first=11, carrier="topk", top_k=top_k)
    score = loop.run(client.score(ask), 60)
    logp_RV = log_probs(model, ids, first=11)
    torch.testing.assert_close(score.logp_RK.double(), logp_RV.gather(-1, score.ids_RK), atol=CLOSE, rtol=0)
    sampled_R = torch.tensor(ids[11:])
    assert (score.ids_RK == sampled_R[:, None]).any(-1).all()
    best_RK = logp_RV.topk(top_k).indices
    for listed, best, sampled in zip(score.ids_RK.tolist(), best_RK.tolist(), ids[11:], strict=True):
        wanted = set(best) if sampled in best else {*best[:-1], sampled}
        assert set(listed) == wanted


def test_hidden_states_with_the_head_give_the_distribution(served, loop):
    model, client, _ = served
    ids = random.Random(4).choices(range(VOCAB_SIZE), k=90)
    for attempt in range(2):  # the second time all of it is in the prefix cache
        ask = Ask(rid=f"hidden-{attempt}", ids=tuple(ids), first=33, carrier="hidden")
        hidden_RD = loop.run(client.score(ask), 60).hidden_RD
        ours_RV = (hidden_RD @ model.lm_head.weight.T).double().log_softmax(-1)
        torch.testing.assert_close(ours_RV, log_probs(model, ids, first=33), atol=CLOSE, rtol=0)


def test_what_the_client_lets_through_the_server_refuses_and_lives(served, loop):
    _, client, settings = served
    trusting = Client(client.url, settings, vocab_size=VOCAB_SIZE, context=10 * CONTEXT)
    with pytest.raises(Refused, match="400"):
        loop.run(trusting.generate(Draw(rid="long", ids=(5,) * (CONTEXT + 1), max_new_tokens=1, temperature=1.0)), 60)
    loop.run(trusting.close(), 10)
    loop.run(client.health(), 60)
