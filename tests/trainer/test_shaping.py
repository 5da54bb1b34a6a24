"""What is said about the answers of a step before means are taken: whose rewards are compared, and what is masked."""

from dataclasses import replace

import pytest
import tiny

from megatron_opd.core.types import Prompt
from megatron_opd.trainer.shaping import Shaping


def answers(*rewards, source="a", index=0, origin="student"):
    prompt = Prompt(source=source, index=index, text="", token_ids=(1,))
    made = [tiny.rollout((1,), (2, 3), origin=origin, sample=sample) for sample in range(len(rewards))]
    return [replace(r, prompt=prompt, reward=reward) for r, reward in zip(made, rewards, strict=True)]


def shaped(rollouts, *, step=0, **sections):
    settings = {"rl": {"weight": 2.0, "normalise": False}, "loss": {"weight": 1.0}, **sections}
    return Shaping(tiny.config("unused", [], **settings), None, None)._of_rollouts(rollouts, step)


def test_answers_of_others_are_in_no_baseline_and_have_no_advantage():
    """Though they answer the same prompt, and were graded."""
    rollouts = [*answers(1.0, 0.0), *answers(1.0, 1.0, origin="teacher"), *answers(0.0, origin="dataset")]
    assert shaped(rollouts).rewarded_R == [1.0, -1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("distill_on", ["wrong", "unsolved"])
def test_answers_of_others_are_distilled_whatever_they_are_worth(distill_on):
    rollouts = [*answers(1.0, 0.0), *answers(1.0, origin="dataset"), *answers(0.0, 0.0, index=1)]
    keeps = {"wrong": [0.0, 1.0, 1.0, 1.0, 1.0], "unsolved": [0.0, 0.0, 1.0, 1.0, 1.0]}[distill_on]
    assert shaped(rollouts, rl={"weight": 1.0, "distill_on": distill_on}).distill_R == keeps


def test_groups_are_apart_by_source_and_row():
    rollouts = [*answers(1.0, 0.0), *answers(1.0, 1.0, source="b"), *answers(0.0, 0.5, index=1)]
    assert shaped(rollouts).rewarded_R == [1.0, -1.0, 0.0, 0.0, -0.5, 0.5]


def test_the_weight_of_the_distillation_is_that_of_the_step():
    anneal = {"weight": 1.0, "anneal": 0.25, "weight_min": 0.1}
    weights = [shaped(answers(0.0), step=step, loss=anneal).distill_R[0] for step in range(5)]
    assert weights == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.1])


@pytest.mark.parametrize("loss", [{"weight": 0.5}, {"weight": 1.0, "aggregation": "sum"}])
def test_rewards_that_are_only_watched_change_nothing(loss):
    """Where something else is shaped."""
    graded = [*answers(1.0, 0.0), *answers(None, 0.5, index=1)]
    bare = [replace(r, reward=None) for r in graded]
    assert shaped(graded, rl={}, loss=loss) == shaped(bare, rl={}, loss=loss)
    assert shaped(graded, rl={}, loss=loss).rewarded_R == [0.0] * 4
