"""What evaluation asks for, how it grades, and its means with their intervals."""

import math
from itertools import combinations
from types import SimpleNamespace

import pytest
import tiny

from megatron_opd.config import DataConfig, SourceConfig
from megatron_opd.core.types import Prompt, Rollout
from megatron_opd.trainer.evaluate import Evaluator, means, num_answers, pass_at, tally_greedy, tally_samples, wilson

WORDS = SimpleNamespace(
    decode=lambda ids: "".join(map(chr, ids)), hf=SimpleNamespace(get_vocab=dict, all_special_ids=[])
)


def answered(source, answer, said):
    prompt = Prompt(source=source, index=0, text="?", token_ids=(1,), answer=answer)
    ids, zeros = tuple(map(ord, said)), (0,) * len(said)
    learnt = (True,) * len(said)
    return Rollout(prompt=prompt, sample=0, token_ids=ids, learnt=learnt, logps=zeros, finish="stop", versions=zeros)


def evaluator(**rewards):
    config = tiny.config("unused", [], rollout={"max_new_tokens": 3, "temperature": 0.7, "top_k": 5})
    sources = [SourceConfig(name=name, path="", reward=reward) for name, reward in rewards.items()]
    return Evaluator(DataConfig(train=[], eval=sources), config.rewards, config.rollout, config.run, WORDS)


def test_each_source_has_its_own_reward_and_order_is_kept():
    rollouts = [
        answered("a", "12", "12"),
        answered("b", "#### 12", "it is 12."),
        answered("a", "12", " 12\n"),
        answered("a", "12", "it is 12"),
        answered("b", "#### 12", "it is 13."),
        answered("a", "", ""),
    ]
    assert evaluator(a="exact", b="gsm8k").grader.grade(rollouts) == [1, 1, 1, 0, 0, 1]


def test_sources_without_a_reward_are_left_out():
    rollouts = [answered("a", "12", "12"), answered("b", None, "well"), answered("a", "12", "13")]
    judge = evaluator(a="exact", b="none")
    assert means([judge.graded(rollouts)], "x", bounds=False) == {
        "x/accuracy/a": 0.5, "x/accuracy/all": 0.5, "x/reward/a": 0.5, "x/reward/all": 0.5
    }  # fmt: skip
    assert means([judge.graded(rollouts[1:2])], "x") == {}


def test_accuracy_counts_what_is_right_and_reward_is_the_mean():
    rollouts = [answered("a", "", "")] * 4
    totals = tally_greedy(rollouts, [1.0, 0.5, 0.5, 0.0])
    assert means([totals], "x", bounds=False) == {
        "x/accuracy/a": 0.25, "x/accuracy/all": 0.25, "x/reward/a": 0.5, "x/reward/all": 0.5
    }  # fmt: skip


def test_means_weigh_prompts_not_sources_or_replicas():
    parts = [{("m", "a"): (1, 2), ("m", "b"): (0, 1)}, {}, {("m", "a"): (3, 3)}]
    found = means(parts, "x", bounds=False)
    assert found == pytest.approx({"x/m/a": 4 / 5, "x/m/b": 0.0, "x/m/all": 4 / 6})
    assert means([], "x") == {}
    low, high = wilson(4 / 5, 5)
    bounded = means(parts, "x")
    assert (bounded["x/m_low/a"], bounded["x/m_high/a"]) == (low, high)


@pytest.mark.parametrize(("mean", "count"), [(0.0, 10), (1.0, 10), (0.5, 1), (0.3, 50), (0.97, 400)])
def test_wilsons_interval_ends_where_the_score_test_rejects(mean, count):
    for end in wilson(mean, count):
        assert 0 <= end <= 1
        if 1e-9 < end < 1 - 1e-9:
            assert abs(mean - end) / math.sqrt(end * (1 - end) / count) == pytest.approx(1.96, abs=1e-4)
    low, high = wilson(mean, count)
    assert low <= mean <= high
    assert high - low > 0.01, "also where every answer is right or wrong"


@pytest.mark.parametrize(("samples", "right"), [(1, 0), (1, 1), (4, 0), (4, 1), (5, 2), (6, 6)])
def test_pass_at_j_is_the_share_of_draws_with_a_right_answer(samples, right):
    for j in range(1, samples + 1):
        draws = list(combinations([True] * right + [False] * (samples - right), j))
        assert pass_at(j, samples=samples, right=right) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_samples_of_a_prompt_are_taken_together():
    rollouts = [answered(source, "", "") for source in "aaaaaabbbbbb"]
    rewards = [1, 0, 0, 0, 0.5, 0, *[1] * 6]
    found = means([tally_samples(rollouts, rewards, samples=6)], "x", bounds=False)
    assert [name for name in found if name.endswith("/a")] == ["x/avg@6/a", "x/pass@2/a", "x/pass@4/a", "x/pass@6/a"]
    assert found["x/avg@6/a"] == pytest.approx(0.25)
    assert found["x/pass@2/a"] == pytest.approx(1 / 3)
    assert found["x/pass@6/all"] == 1


def test_greedy_first_then_samples_at_the_temperature_of_training():
    asked = []

    told = []

    def generate(prompts, sampling, on_finished):
        asked.append(sampling)
        made = [answered("a", "x", "x") for _ in prompts for _ in range(sampling.samples_per_prompt)]
        for rollout in made:
            on_finished(rollout)
        return made

    engine, prompts = SimpleNamespace(generate=generate), [answered("a", "x", "").prompt] * 2
    rollouts, totals = evaluator(a="exact").answer(engine, prompts)
    assert (len(rollouts), set(totals)) == (2, {("accuracy", "a"), ("reward", "a")})
    rollouts, totals = evaluator(a="exact").answer(engine, prompts, samples=3, told=told.append)
    assert len(rollouts) == 2, "the greedy ones"
    assert len(told) == num_answers(2, 3) == 8
    assert num_answers(2, 1) == 2
    assert totals["avg@3", "a"] == (2, 2)
    assert [(s.temperature, s.samples_per_prompt, s.max_new_tokens, s.top_k) for s in asked] == [
        (0.0, 1, 3, 0), (0.0, 1, 3, 0), (0.7, 3, 3, 5)
    ]  # fmt: skip
    assert evaluator(a="exact").answer(engine, [], samples=3) == ([], {})
    assert len(asked) == 3, "nothing is asked when there is nothing to ask"
