"""Trajectories and the episodes that they make up."""

from dataclasses import replace

import pytest
import tiny
import torch

from megatron_opd.core.batching import pack
from megatron_opd.core.episodes import episodes, last_turn


def two_parts(index=0, sample=0):
    """An episode whose second trajectory begins with a prompt written anew, and reads what the first learns."""
    first = tiny.rollout((1, 2), (10, 11, 50, 12), learnt=(1, 1, 0, 1), index=index, sample=sample)
    second = tiny.rollout((1, 3), (12, 60, 13, 14), learnt=(0, 0, 1, 1), index=index, sample=sample, part=1)
    return [first, second]


def test_lists_are_cut_into_episodes():
    plain = tiny.rollout((1,), (2,))
    assert episodes([]) == []
    assert episodes([plain, plain]) == [[0], [1]]  # answers of one row each are one
    made = [plain, *two_parts(1), *two_parts(1, sample=1), plain]
    assert episodes(made) == [[0], [1, 2], [3, 4], [5]]
    assert episodes(made[2:]) == [[0], [1, 2], [3]]


@pytest.mark.parametrize("change", [{"sample": 1}, {"part": 2}])
def test_a_trajectory_that_does_not_follow_its_episode_is_refused(change):
    first, second = two_parts()
    with pytest.raises(ValueError, match="does not follow"):
        episodes([first, replace(second, **change)])
    other = tiny.rollout((1,), (2,), index=9)
    with pytest.raises(ValueError, match=r"trajectory 1 of sample 0.*does not follow trajectory 0"):
        episodes([first, other, second])


def test_no_token_is_learnt_twice():
    made = two_parts()
    batches = pack(made, micro_batch_size=1, length_multiple=1, device=torch.device("cpu"))
    assert [batch.targets_T.tolist() for batch in batches] == [[10, 11, 12], [13, 14]]
    assert made[0].prompt.group == made[1].prompt.group


def test_the_last_turn():
    first, second = two_parts()
    assert last_turn(first) == (12,)
    assert last_turn(second) == (13, 14)
    assert last_turn(tiny.rollout((1,), (2, 3))) == (2, 3)
    assert last_turn(tiny.rollout((1,), (2, 3, 4, 5), learnt=(1, 1, 0, 0))) == (2, 3)
    assert last_turn(tiny.rollout((1,), (2,), learnt=(0,))) == ()


def test_numbers_of_tokens_agree():
    rollout = tiny.rollout((1,), (2, 3, 4), learnt=(1, 0, 1))
    assert (rollout.learnt_ids, rollout.num_learnt) == ((2, 4), 2)
    with pytest.raises(ValueError, match="3 tokens with 2 entries of the mask"):
        replace(rollout, learnt=(True, True))
    with pytest.raises(ValueError, match="2 learnt tokens with 3 log-probabilities and 2 versions"):
        replace(rollout, logps=(-1.0,) * 3)  # one for every token is not what is meant
    with pytest.raises(ValueError, match="2 learnt tokens with 2 log-probabilities and 1 versions"):
        replace(rollout, versions=(0,))
