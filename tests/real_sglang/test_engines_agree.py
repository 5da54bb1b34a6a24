"""Episodes on a real server: token by token those of the embedded engine."""

from dataclasses import replace

import pytest
import torch
from test_play import prompt_for, tokenizer, world

from megatron_opd.core.types import Sampling
from megatron_opd.rollout.embedded_engine import LocalEngine
from megatron_opd.rollout.episode_engine import EpisodeEngine
from megatron_opd.rollout.served_engine import SGLangEngine
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.pool import Pool

MODEL, VOCAB_SIZE, CONTEXT = "examples/tools/models/teacher", 128, 256
GREEDY = Sampling(max_new_tokens=24, temperature=0.0)


@pytest.fixture(scope="module")
def server(serve):
    with serve(MODEL, context=CONTEXT) as (_, settings):
        yield settings


@pytest.fixture
def served(server, loop):
    client = Client(server.urls[0], server, vocab_size=VOCAB_SIZE, context=CONTEXT)
    pool = Pool([client], server, name="student")
    yield SGLangEngine(pool, loop, None, eos_ids=tokenizer().eos_ids, vocab_size=VOCAB_SIZE)
    loop.run(pool.close(), 30)


def prompts(count):
    made = world(max_tokens=200)
    asked = [prompt_for(made, f"{101 + 83 * i}*{997 - 61 * i}") for i in range(count)]
    return made, [replace(one, index=i) for i, one in enumerate(asked)]


def test_engines_agree_token_by_token(served):
    made, asked = prompts(8)
    local = LocalEngine(MODEL, eos_ids=tokenizer().eos_ids, vocab_size=VOCAB_SIZE)
    found = {}
    for name, engine in {"served": served, "embedded": local}.items():
        player = EpisodeEngine(engine, {"products": made})
        found[name] = player.generate(asked, GREEDY)
        player._thread.close()
    assert any(rollout.log.calls and not all(rollout.learnt) for rollout in found["served"])
    for one, other in zip(found["served"], found["embedded"], strict=True):
        assert one.token_ids == other.token_ids
        assert one.learnt == other.learnt
        assert one.log == other.log
        assert one.logps == pytest.approx(other.logps, abs=1e-4)


def test_samples_of_several_turns_have_the_log_probabilities_of_their_tokens(served):
    made, asked = prompts(6)
    player = EpisodeEngine(served, {"products": made})
    rollouts = player.generate(asked, Sampling(max_new_tokens=24, temperature=1.0, samples_per_prompt=4, seed=5))
    player._thread.close()
    assert len(rollouts) == 24
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
        with torch.no_grad():
            logp = model(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1].double().log_softmax(-1)
        own = logp.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        learnt = torch.tensor(rollout.learnt)
        torch.testing.assert_close(own[learnt], torch.tensor(rollout.logps).double(), atol=1e-4, rtol=0)
