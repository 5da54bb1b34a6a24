"""The grid of ranks and sharing: who leads, who gets what, and how an error travels."""

import pytest

from megatron_opd.core.parallel import PeerError


def place(parallel):
    p = parallel
    return {
        "place": (p.tensor_rank, p.pipeline_rank, p.data_rank),
        "leader": p.is_leader,
        "last": p.is_last_stage,
        "shared": p.share(lambda: f"from {p.rank}"),
        "everybody's": p.share_world(lambda: f"from {p.rank}"),
        "leaders": p.gather_leaders(p.rank),
    }


def places(by_rank):
    return [answer["place"] for answer in by_rank]


def test_grid_of_tensor_and_pipeline(ranks):
    by_rank = ranks.run(4, place, tensor=2, pipeline=2)
    assert places(by_rank) == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert [a["leader"] for a in by_rank] == [True, False, False, False]
    assert [a["last"] for a in by_rank] == [False, False, True, True]
    assert {a["shared"] for a in by_rank} == {"from 0"}
    assert {tuple(a["leaders"]) for a in by_rank} == {(0,)}


@pytest.mark.parametrize(
    ("layout", "expected", "shared"),
    [
        ({"tensor": 2, "data": 2}, [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)], [0, 0, 2, 2]),
        ({"pipeline": 2, "data": 2}, [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)], [0, 1, 0, 1]),
    ],
    ids=["tp2dp2", "pp2dp2"],
)
def test_grid_with_replicas(ranks, layout, expected, shared):
    by_rank = ranks.run(4, place, **layout)
    assert places(by_rank) == expected
    assert [a["shared"] for a in by_rank] == [f"from {r}" for r in shared]
    assert {a["everybody's"] for a in by_rank} == {"from 0"}
    assert {tuple(a["leaders"]) for a in by_rank} == {tuple(sorted(set(shared)))}


def fail_in_replica(parallel, data_rank):
    """The error of this rank, by type and message; replicas without an error get their result."""

    def compute():
        if parallel.data_rank == data_rank:
            raise KeyError("no such thing")
        return "fine"

    try:
        return parallel.share(compute)
    except (KeyError, PeerError) as error:
        return f"{type(error).__name__}: {error}"


def test_an_error_of_the_leader_is_everybodys_in_its_replica(ranks):
    answers = ranks.run(4, fail_in_replica, 1, tensor=2, data=2)
    assert answers == ["fine", "fine", "KeyError: 'no such thing'", "PeerError: KeyError: 'no such thing'"]


def ask_for_four(parallel):
    from megatron_opd.config import ParallelConfig
    from megatron_opd.student import groups

    with pytest.raises(ValueError, match=r"2 ranks were started, but .* 2 x 1 x 1 x 2 = 4"):
        groups.check_world_size(ParallelConfig(tensor=2, data=2))
    return True


def test_wrong_number_of_ranks_is_named(ranks):
    assert ranks.run(2, ask_for_four) == [True, True]
