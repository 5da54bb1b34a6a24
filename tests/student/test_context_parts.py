"""A context-parallel rank's part of a micro-batch: the parts are a partition, and nothing of a token changes."""

import pytest
import tiny
import torch

from megatron_opd.config import ParallelConfig
from megatron_opd.core.batching import pack
from megatron_opd.core.scores import Sampled
from megatron_opd.student.context import Split, in_order


def whole(size, seed, micro_batch_size=4):
    """A micro-batch whose every token has values of its own."""
    rollouts = tiny.rollouts(count=micro_batch_size, vocab_size=90, seed=seed)
    if seed % 2:  # some tokens are context
        rollouts = [tiny.masked(r, seed) for r in rollouts]
    lengths = [sum(r.learnt) for r in rollouts]
    scores = [[Sampled(torch.arange(n) + 100.0 * i) for i, n in enumerate(lengths)]]
    [batch] = pack(
        rollouts, micro_batch_size=micro_batch_size, length_multiple=2 * size, device=torch.device("cpu"),
        scores=scores, weights=[[1.0 + i] for i in range(micro_batch_size)],
    )  # fmt: skip
    return batch


def parts(size, batch):
    return [Split(rank, size, None).part(batch) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_positions_are_a_partition_with_equal_work(size):
    length = 12 * size
    by_rank = [Split(rank, size, None).positions(length) for rank in range(size)]
    assert torch.cat(by_rank).sort().values.tolist() == list(range(length))
    assert len({sum(1 + p for p in positions.tolist()) for positions in by_rank}) == 1  # pairs of query and key
    assert all(p.diff().min() > 0 for p in by_rank)
    assert torch.equal(in_order(torch.cat(by_rank), size), torch.arange(length))


def test_two_ranks():
    assert Split(0, 2, None).positions(8).tolist() == [0, 1, 6, 7]
    assert Split(1, 2, None).positions(8).tolist() == [2, 3, 4, 5]
    assert in_order(torch.tensor([0, 1, 6, 7, 2, 3, 4, 5]), 2).tolist() == list(range(8))
    with pytest.raises(AssertionError, match="a length of 6 has no 4 equal chunks"):
        Split(0, 2, None).positions(6)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_every_response_token_is_in_one_part_with_all_that_is_its(size, seed):
    batch = whole(size, seed)
    told = {}
    for rank, part in enumerate(parts(size, batch)):
        length, split = part.tokens_BS.shape[1], Split(rank, size, None)
        positions = split.positions(batch.tokens_BS.shape[1])
        assert torch.equal(part.tokens_BS, batch.tokens_BS[:, positions])
        for t, row in enumerate(part.predicted_at_T.tolist()):
            at = row // length * batch.tokens_BS.shape[1] + positions[row % length].item()
            of_teacher = part.teachers[0].logp_R[t].item()
            told[at] = (part.targets_T[t], part.behaviour_logp_T[t], part.weights_TN[t, 0], of_teacher)
        assert torch.equal(batch.targets_T[split.has(batch)], part.targets_T)  # in the same order
    logp_T = batch.teachers[0].logp_R
    its = zip(batch.targets_T, batch.behaviour_logp_T, batch.weights_TN[:, 0], logp_T.tolist(), strict=True)
    assert sum(len(part.predicted_at_T) for part in parts(size, batch)) == len(batch.predicted_at_T)
    assert told == dict(zip(batch.predicted_at_T.tolist(), its, strict=True))


@pytest.mark.parametrize(
    ("layout", "multiple"),
    [({}, 1), ({"tensor": 4}, 1), ({"tensor": 4, "sequence": True}, 4), ({"context": 2}, 4),
     ({"context": 4, "tensor": 2, "sequence": True}, 16)],
)  # fmt: skip
def test_padding(layout, multiple):
    assert ParallelConfig(**layout).length_multiple == multiple
