"""Advantages of flat tokens, against loops over single answers in plain Python."""

import math

import pytest
import torch

from megatron_opd.config import PolicyConfig, RLConfig
from megatron_opd.core.types import Prompt
from megatron_opd.trainer import advantages

LENGTHS = (4, 1, 7, 2)
ANSWERS = torch.repeat_interleave(torch.tensor([0, 1, 3, 4]), torch.tensor(LENGTHS))  # numbers may have gaps


def values(seed=0):
    return torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_answer(x):
    return [part.tolist() for part in x.split(LENGTHS)]


def by_hand(logp, behaviour, how):
    """policy.kl_… for one answer, token by token."""
    made = []
    for p, mu in zip(by_answer(logp), by_answer(behaviour), strict=True):
        x = [a - b for a, b in zip(p, mu, strict=True)]
        if how.kl_clip:
            x = [max(-how.kl_clip, min(how.kl_clip, v)) for v in x]
        for t in range(len(x)):
            start = t + (how.kl_from == "next")
            total = sum(how.kl_discount ** (i - start) * x[i] for i in range(start, len(x)))
            made.append(total / (len(x) - start) if how.kl_length_norm and start < len(x) else total)
    return torch.tensor(made, dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl_clip": 0.5},
        {"kl_discount": 0.9},
        {"kl_discount": 1.0, "kl_length_norm": True},
        {"kl_discount": 1.0, "kl_length_norm": True, "kl_from": "next", "kl_clip": 1.0},
        {"kl_discount": 0.7, "kl_from": "next"},
    ],
    ids=str,
)
def test_teachers_advantage_is_what_loops_give(settings):
    how = PolicyConfig(**settings)
    logp, behaviour = values(), values(1)
    found = advantages.from_teachers(logp, behaviour, ANSWERS, how)
    torch.testing.assert_close(found, by_hand(logp, behaviour, how))


def test_nothing_crosses_from_one_answer_into_another():
    x = torch.zeros(sum(LENGTHS))
    x[-1] = 1.0
    assert advantages.returns(x, ANSWERS, 1.0).tolist() == [0.0] * 12 + [1.0, 1.0]
    assert advantages.next_in_sequence(torch.ones(sum(LENGTHS)), ANSWERS).tolist() == [
        *([1.0] * 3 + [0.0]),
        0.0,
        *([1.0] * 6 + [0.0]),
        *(1.0, 0.0),
    ]


def test_the_discount_counts_from_the_token():
    """Not from the beginning of the answer, which would fade whatever comes late."""
    x = torch.ones(5, dtype=torch.float64)
    found = advantages.returns(x, torch.zeros(5, dtype=torch.long), 0.5)
    assert found.tolist() == [1.9375, 1.875, 1.75, 1.5, 1.0]


def test_no_tokens():
    nothing = torch.zeros(0)
    assert advantages.from_teachers(
        nothing, nothing, nothing.long(), PolicyConfig(kl_discount=1.0, kl_length_norm=True, kl_from="next")
    ).shape == (0,)


REWARDS = [1.0, 0.0, 0.0, 0.5, 0.5, 1.0, 0.25]
GROUPS = ["a", "a", "b", "a", "b", "c", "b"]


def test_rewards_are_compared_within_their_group():
    centred = advantages.from_rewards(REWARDS, GROUPS, RLConfig(normalise=False))
    assert centred == pytest.approx([0.5, -0.5, -0.25, 0.0, 0.25, 0.0, 0.0])
    scaled = advantages.from_rewards(REWARDS, GROUPS, RLConfig())
    of_a, of_b = 0.5, 0.25  # sqrt((0.25 + 0.25 + 0) / 2), sqrt((0.0625 + 0.0625 + 0) / 2)
    assert scaled == pytest.approx([0.5 / of_a, -0.5 / of_a, -0.25 / of_b, 0.0, 0.25 / of_b, 0.0, 0.0])
    assert advantages.from_rewards(REWARDS, GROUPS, RLConfig(baseline="none")) == REWARDS


@pytest.mark.parametrize("other", [{"source": "b"}, {"index": 4}, {"repeat": 1}], ids=str)
def test_a_group_is_one_draw_of_one_row_of_one_source(other):
    row = {"source": "a", "index": 3, "text": "", "token_ids": (1,)}
    prompts = [Prompt(**row), Prompt(**row), Prompt(**row | other), Prompt(**row | other)]
    groups = [prompt.group for prompt in prompts]
    assert advantages.from_rewards([1.0, 0.0, 1.0, 1.0], groups, RLConfig(normalise=False)) == [0.5, -0.5, 0.0, 0.0]


def test_equal_rewards_teach_nothing():
    assert advantages.from_rewards([0.1] * 3, ["a"] * 3, RLConfig()) == [0.0] * 3


def test_which_answers_are_distilled():
    assert advantages.distills(REWARDS, GROUPS, RLConfig()) == [True] * 7
    wrong = [reward < 1 for reward in REWARDS]
    assert advantages.distills(REWARDS, GROUPS, RLConfig(distill_on="wrong")) == wrong
    unsolved = [group == "b" for group in GROUPS]
    assert advantages.distills(REWARDS, GROUPS, RLConfig(distill_on="unsolved")) == unsolved


def test_annealing():
    weights = [advantages.annealed(1.0, by=0.3, least=0.2, step=step) for step in range(5)]
    assert weights == pytest.approx([1.0, 0.7, 0.4, 0.2, 0.2])
    assert advantages.annealed(0.5, by=0.0, least=0.0, step=100) == 0.5


@pytest.mark.parametrize("how", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"])
def test_shares_make_the_aggregation_of_the_mean_over_tokens(how):
    x = values()
    tokens, answers = sum(LENGTHS), len(LENGTHS)
    factors = advantages.shares(LENGTHS, how=how, tokens=tokens, episodes=answers)
    found = sum(f * sum(part) for f, part in zip(factors, by_answer(x), strict=True)) / tokens
    wanted = {
        "token-mean": math.fsum(x.tolist()) / tokens,
        "seq-mean-token-mean": sum(math.fsum(part) / len(part) for part in by_answer(x)) / answers,
        "seq-mean-token-sum": math.fsum(x.tolist()) / answers,
        "sum": math.fsum(x.tolist()),
    }[how]
    assert found == pytest.approx(wanted)
