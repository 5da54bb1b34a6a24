"""Who is on the GPU when, on a made-up GPU: two streams of work that runs late, and memory that is counted."""

from dataclasses import dataclass, field

import pytest

from megatron_opd.teachers import ask_all
from megatron_opd.teachers.offload import OffloadedWeights, in_turn
from megatron_opd.teachers.rounded_head import RoundedHead


@dataclass
class Gpu:
    """What was asked for, in order, and how many models were there at a time."""

    log: list = field(default_factory=list)
    there: set = field(default_factory=set)
    most: int = 0

    def weights(self, name, ahead=True):
        return OffloadedWeights(
            lambda: self._fetch(name), lambda: self.log.append(f"wait {name}"), lambda: self._drop(name), ahead=ahead
        )

    def _fetch(self, name):
        assert name not in self.there, "it was there already"
        self.there.add(name)
        self.most = max(self.most, len(self.there))
        self.log.append(f"fetch {name}")

    def _drop(self, name):
        self.there.remove(name)
        self.log.append(f"drop {name}")


class Teacher:
    """One that says its name about every answer; with `weights`, only while they are there."""

    head_LD = None

    def __init__(self, gpu, name, weights=None, fails=False):
        self.gpu, self.name, self.offloaded, self.fails = gpu, name, weights, fails

    def score(self, rollouts):
        if not rollouts:
            self.gpu.log.append(f"nothing {self.name}")
            return []
        if self.offloaded is None:
            self.gpu.log.append(f"score {self.name}")
        else:
            with self.offloaded.there():
                assert self.name in self.gpu.there
                self.gpu.log.append(f"score {self.name}")
        if self.fails:
            raise RuntimeError("no")
        return [f"{self.name} of {rollout}" for rollout in rollouts]


def teachers(gpu, kinds):
    """By name: "-" stays, "1" is fetched alone, everything else ahead."""
    return [
        Teacher(gpu, name, None if kind == "-" else gpu.weights(name, ahead=kind != "1"))
        for name, kind in kinds.items()
    ]


def asked(gpu, kinds, weights):
    return ask_all(teachers(gpu, kinds), ["x", "y"], weights)


def test_the_next_one_is_on_its_way_while_one_scores():
    gpu = Gpu()
    scores = asked(gpu, {"a": "+", "b": "+", "c": "+"}, [[1.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    assert scores == [["a of x", None], ["b of x", "b of y"], [None, "c of y"]]
    assert gpu.log == [
        "fetch a", "fetch b", "wait a", "score a", "drop a",
        "fetch c", "wait b", "score b", "drop b",
        "wait c", "score c", "drop c",
    ]  # fmt: skip
    assert (gpu.most, gpu.there) == (2, set())


def test_without_prefetch_there_is_one_at_a_time():
    gpu = Gpu()
    asked(gpu, {"a": "1", "b": "1"}, [[1.0, 1.0]] * 2)
    assert gpu.log == ["fetch a", "wait a", "score a", "drop a", "fetch b", "wait b", "score b", "drop b"]
    assert gpu.most == 1


def test_teachers_that_stay_hide_copies_too():
    gpu = Gpu()
    asked(gpu, {"a": "-", "b": "-", "c": "+", "d": "-", "e": "+"}, [[1.0] * 5] * 2)
    assert gpu.log == [
        "fetch c", "score a", "score b", "fetch e", "wait c", "score c", "drop c", "score d",
        "wait e", "score e", "drop e",
    ]  # fmt: skip
    assert gpu.most == 2


def test_who_is_not_asked_is_not_fetched():
    gpu = Gpu()
    assert asked(gpu, {"a": "+", "b": "+", "c": "+"}, [[1.0, 0.0, 1.0]] * 2)[1] == [None, None]
    assert "fetch b" not in gpu.log
    assert gpu.log.index("fetch c") < gpu.log.index("score a") < gpu.log.index("nothing b")


def test_an_error_leaves_nothing_on_the_gpu():
    gpu = Gpu()
    first, second = teachers(gpu, {"a": "+", "b": "+"})
    first.fails = True
    with pytest.raises(RuntimeError, match="no") as kept:
        ask_all([first, second], ["x"], [[1.0, 1.0]])
    assert gpu.there == set()
    assert kept.tb is not None  # the frames in which it failed are still there
    assert "drop b" in gpu.log


def test_whoever_stops_early_leaves_nothing():
    gpu = Gpu()
    turns = in_turn([gpu.weights("a"), gpu.weights("b")])
    assert next(turns) == 0
    assert gpu.there == {"a", "b"}
    turns.close()
    assert gpu.there == set()


def test_a_teacher_that_is_asked_on_its_own():
    gpu = Gpu()
    (teacher,) = teachers(gpu, {"a": "+"})
    assert teacher.score(["x"]) == ["a of x"]
    assert gpu.log == ["fetch a", "wait a", "score a", "drop a"]


def test_a_wrapped_teacher_is_seen():
    gpu = Gpu()
    wrapped = RoundedHead.__new__(RoundedHead)
    (wrapped.inner,) = teachers(gpu, {"b": "+"})
    assert wrapped.offloaded is wrapped.inner.offloaded
    wrapped.inner = Teacher(gpu, "a")
    assert wrapped.offloaded is None
