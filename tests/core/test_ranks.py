"""The pool of rank processes itself: results by rank, failures in words, and life after a failure."""

import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError


def sum_of_ranks(parallel, offset):
    total = torch.tensor(parallel.rank + offset)
    dist.all_reduce(total, group=parallel.tensor_group)
    return parallel.rank, total.item()


def fail_on(parallel, rank):
    if parallel.rank == rank:
        raise RuntimeError(f"rank {rank} has a problem")
    dist.barrier()


def sleep(parallel, seconds):
    time.sleep(seconds if parallel.rank == 1 else 0)


def test_results_come_back_by_rank(ranks):
    assert ranks.run(2, sum_of_ranks, 10) == [(0, 21), (1, 21)]
    assert ranks.run(1, sum_of_ranks, 3) == [(0, 3)]


def test_failing_rank_is_named_first_and_the_pool_lives_on(ranks):
    with pytest.raises(RankError, match=r"(?s)^rank 1:\nTraceback.*rank 1 has a problem"):
        ranks.run(2, fail_on, 1)
    assert ranks.run(2, sum_of_ranks, 0) == [(0, 1), (1, 1)]


def test_hanging_rank_is_killed(ranks):
    with pytest.raises(RankError, match=r"did not come back and were killed: .*1\]"):
        ranks.run(2, sleep, 60, timeout_s=5)
    assert ranks.run(2, sum_of_ranks, 0) == [(0, 1), (1, 1)]
