"""Episodes that the embedded engine plays with real environments: the step on them is that of the dense formula in
float64 on the policy's tokens alone, on every layout and for every carrier. One source calls a tool; at the other one
the chat template rewrites earlier turns, so its episodes have several trajectories."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import steps
import tiny
import torch
from test_play import CALL, FORGETS, kind_of, prompt_for, tokenizer, world
from test_trajectories import TOP_K, Told, train_on

from megatron_opd.core.environment import Reply
from megatron_opd.core.types import Sampling
from megatron_opd.rollout.embedded_engine import LocalEngine
from megatron_opd.rollout.episode_engine import EpisodeEngine

MODELS = "examples/tools/models"
VOCAB_SIZE, NUM_STEPS = 128, 2
CALLER = {"name": "caller", "model": f"{MODELS}/teacher"}
LAYOUTS = {
    "alone": ({"tensor": 1}, False),
    "tp2 sequence": ({"tensor": 2, "sequence": True}, False),
    "cp2": ({"context": 2}, False),
    "packed": ({"tensor": 1}, True),
    "packed pp2": ({"pipeline": 2}, True),
    "packed tp2pp2": ({"tensor": 2, "pipeline": 2}, True),
}


async def asks(turn):
    """Another user's message after each of two turns, a tool's after the first."""
    if turn.number == 2:
        return Reply()
    return Reply(messages=[{"role": "user" if turn.number else "tool", "content": f"{turn.number}*7"}])


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """Episodes of a policy that can call, sampled hot enough that some calls are wrong."""
    template = tmp_path_factory.mktemp("template") / "forgets.jinja"
    template.write_text(FORGETS.replace("m.content.split('</think>')[-1]", "m.content[2:]"))
    calls, forgets = world(), world(kind_of(asks), template=str(template), max_turns=3)
    prompts = [replace(prompt_for(calls, f"{111 + 37 * i}*{999 - 41 * i}"), source="a", index=i) for i in range(4)]
    prompts += [replace(prompt_for(forgets, f"{i}+{i}"), source="b", index=i) for i in range(3)]
    local = LocalEngine(f"{MODELS}/teacher", eos_ids=tokenizer().eos_ids, vocab_size=VOCAB_SIZE)
    engine = EpisodeEngine(local, {"a": calls, "b": forgets})
    how = Sampling(max_new_tokens=20, temperature=1.4, samples_per_prompt=2, seed=11)
    found = engine.generate(prompts, how)
    again = engine.generate(list(reversed(prompts)), how)
    engine.close()
    assert sorted(found, key=place) == sorted(again, key=place)  # whatever else is drawn with them
    return found


def place(rollout):
    return rollout.prompt.source, rollout.prompt.index, rollout.sample, rollout.part


@cache
def model(name):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(f"{MODELS}/{name}", dtype=torch.float32, attn_implementation="eager")


def settings(*, packing, teacher=CALLER, **loss):
    return tiny.config(
        f"{MODELS}/student",
        [teacher],
        loss={"beta": 0.5, "chunk_tokens": 7, **loss},
        optim={"lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.1, "eps": 1e-5},  # a gradient of nearly 0 has no sign
        train={"steps": 6, "micro_batch_size": 3, "packing": packing},
    )


@pytest.fixture(scope="module")
def reference(rollouts):
    """Metrics of the steps, and the weights after them, by the dense formula."""
    made = steps.Reference(settings(packing=False), copy.deepcopy(model("student")), [model("teacher")], VOCAB_SIZE)
    return [made.step(rollouts, number) for number in range(1, NUM_STEPS + 1)], made.student.state_dict()


def test_what_was_played(rollouts):
    by_source = {source: [r for r in rollouts if r.prompt.source == source] for source in "ab"}
    assert any(r.log.calls and not all(r.learnt) for r in by_source["a"])
    assert {r.part for r in by_source["b"]} == {0, 1}
    assert len({len(r.token_ids) for r in rollouts}) > 5
    assert CALL.startswith("<tool_call>")


@pytest.mark.parametrize(("layout", "packing"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_step_learns_the_policy_s_tokens_alone(ranks, rollouts, reference, layout, packing):
    made, (wanted, weights) = settings(packing=packing), reference
    size = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1)
    for metrics, _, exported in ranks.run(size, steps.train, made, rollouts, VOCAB_SIZE, NUM_STEPS, **layout):
        for found, expected in zip(metrics, wanted, strict=True):
            assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5)
        for name, tensor in exported.items():
            torch.testing.assert_close(tensor.double(), weights[name], atol=1e-5, rtol=0, msg=name)
    assert wanted[0]["num_tokens"] == sum(sum(r.learnt) for r in rollouts) < sum(len(r.learnt) for r in rollouts)


@pytest.mark.parametrize(
    ("carrier", "layout", "packing"),
    [("topk", {"tensor": 2}, False), ("topk", {"tensor": 1}, True), ("sampled", {"context": 2}, False)],
)
def test_what_servers_tell_is_learnt_at_the_policy_s_tokens_alone(ranks, rollouts, carrier, layout, packing):
    loss = {"kind": "sampled", "estimator": "k2"} if carrier == "sampled" else {"beta": 0.6}
    told = {"name": "told", "model": "", "backend": "sglang", "carrier": carrier, "top_k": TOP_K}
    made = settings(packing=packing, teacher=told, **loss)
    reference = Told(made, copy.deepcopy(model("student")), [model("teacher")], VOCAB_SIZE)
    scores = [reference.score(rollout) for rollout in rollouts]
    wanted = [reference.step(rollouts, number) for number in range(1, NUM_STEPS + 1)]
    weights, size = reference.student.state_dict(), max(layout.values())
    for metrics, exported in ranks.run(size, train_on, made, rollouts, scores, VOCAB_SIZE, **layout):
        for found, expected in zip(metrics, wanted, strict=True):
            assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5)
        for name, tensor in exported.items():
            torch.testing.assert_close(tensor.double(), weights[name], atol=1e-5, rtol=0, msg=name)
