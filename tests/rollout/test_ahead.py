"""Sampling ahead of the training: what is started when, what a batch consists of, what a checkpoint would hold."""

import threading
import time

import pytest

from megatron_opd.config import SourceConfig
from megatron_opd.core.types import Prompt
from megatron_opd.prompts.mix import PromptMix
from megatron_opd.rollout.ahead import Ahead

STEPS = 6


def mix(given=None):
    prompts = [Prompt(source="a", index=i, text="", token_ids=(i,)) for i in range(7)]
    made = PromptMix([(SourceConfig(name="a", path=""), prompts)], seed=1)
    if given:
        made.load_state(given)
    return made


def batches(max_staleness, *, sample=lambda step, prompts: (step, prompts), given=None, first=0):
    ahead = Ahead(mix(given), sample, num_prompts=2, max_staleness=max_staleness, num_steps=STEPS)
    try:
        return [(ahead.take(step)(), ahead.cursor) for step in range(first, STEPS)]
    finally:
        ahead.close()


@pytest.mark.parametrize("max_staleness", [1, 2, 9])
def test_batches_and_cursors_do_not_depend_on_staleness(max_staleness):
    assert batches(max_staleness) == batches(0)
    assert [step for (step, _), _ in batches(max_staleness)] == list(range(STEPS))


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_run_continues_with_the_batch_after_the_last_taken(max_staleness):
    whole = batches(max_staleness)
    assert batches(max_staleness, given=whole[2][1], first=3) == whole[3:]


def test_nothing_is_sampled_ahead_at_staleness_0():
    sampled = []
    ahead = Ahead(mix(), lambda step, _: sampled.append(step), num_prompts=2, max_staleness=0, num_steps=STEPS)
    waiting = ahead.take(0)
    assert sampled == []
    waiting()
    assert sampled == [0]


def test_the_next_batch_is_sampled_meanwhile_and_no_further():
    sampled, go_on = [], threading.Event()

    def sample(step, prompts):
        assert go_on.wait(120)
        sampled.append(step)
        return []

    ahead = Ahead(mix(), sample, num_prompts=2, max_staleness=1, num_steps=STEPS)
    waiting = ahead.take(0)
    assert sampled == []
    go_on.set()
    waiting()
    ahead.settle()
    assert sorted(sampled) == [0, 1]
    for step in range(1, STEPS):
        ahead.take(step)()
    ahead.settle()
    assert sorted(sampled) == list(range(STEPS))  # and none beyond the last step


def test_settle_waits_for_what_is_under_way():
    ended = []

    def sample(step, prompts):
        time.sleep(0.2)
        ended.append(step)
        return []

    ahead = Ahead(mix(), sample, num_prompts=2, max_staleness=2, num_steps=STEPS)
    ahead.take(0)()
    ahead.settle()
    assert sorted(ended) == [0, 1, 2]


def test_a_failure_ahead_is_raised_by_its_own_batch():
    def sample(step, prompts):
        if step == 1:
            raise ValueError("lost")
        return [step]

    ahead = Ahead(mix(), sample, num_prompts=2, max_staleness=2, num_steps=STEPS)
    assert ahead.take(0)() == [0]
    ahead.settle()
    waiting = ahead.take(1)
    with pytest.raises(ValueError, match="lost"):
        waiting()
    assert ahead.take(2)() == [2]
    ahead.close()


def test_ranks_that_do_not_sample_draw_the_same_prompts():
    leader, other = ([Ahead(mix(), sample, num_prompts=2, max_staleness=1, num_steps=STEPS) for sample in
                      (lambda step, prompts: prompts, None)])  # fmt: skip
    for step in range(STEPS):
        assert leader.take(step)() != other.take(step)() == []
        assert leader.cursor == other.cursor
    leader.close()
