"""Rewards that nobody learns from: graded where that can be, and never the end of a run."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_opd.config import RewardsConfig, SourceConfig
from megatron_opd.core.types import Prompt, Rollout
from megatron_opd.rewards.grading import Grader, Watcher

WORDS = SimpleNamespace(
    decode=lambda ids: "".join(map(chr, ids)), hf=SimpleNamespace(get_vocab=dict, all_special_ids=[])
)


ROWS = {}
"""The number of each row, by its source and answer."""


def answered(source, answer, said, origin="student"):
    row = ROWS.setdefault((source, answer), len(ROWS))
    prompt = Prompt(source=source, index=row, text="?", token_ids=(1,), answer=answer)
    ids = tuple(map(ord, said))
    same = {"learnt": (True,) * len(ids), "logps": (0.0,) * len(ids), "versions": (0,) * len(ids)}
    return Rollout(prompt=prompt, sample=0, token_ids=ids, finish="stop", origin=origin, **same)


def watcher(kind=Watcher, **rewards):
    return kind([SourceConfig(name=n, path="", reward=r) for n, r in rewards.items()], RewardsConfig(), WORDS)


def test_rows_without_a_reference_are_left_out():
    rollouts = [
        answered("a", "12", "12"),
        answered("a", None, "12"),
        answered("b", "no number here", "12"),
        answered("b", "#### 12", "13"),
        answered("a", "12", "12", origin="dataset"),
        answered("a", "12", "13"),
    ]
    watching = watcher(a="exact", b="gsm8k")
    assert watching.grade(rollouts) == [1, None, None, 0, None, 0]
    assert watching.news() == []


def test_a_row_is_asked_once_for_what_its_reward_needs():
    watching, asked = watcher(a="exact"), []
    rewards = watching.grader.rewards
    rewards["a"] = replace(rewards["a"], check=lambda prompt: asked.append(prompt.index))
    for _ in range(3):
        watching.grade([answered("a", "12", "12"), answered("a", "12", "13"), answered("a", "7", "7")])
    assert len(asked) == 2


def raises(prompt, response):
    if response == "bad":
        raise KeyError("mine")
    return 0.5


def returns_too_much(prompt, response):
    return 7


@pytest.mark.parametrize("function", ["raises", "returns_too_much"])
def test_a_reward_that_fails_is_a_warning_once_and_the_others_go_on(monkeypatch, function):
    monkeypatch.setitem(__import__("sys").modules, "watched_rewards", SimpleNamespace(**globals()))
    watching = watcher(mine=f"watched_rewards:{function}", a="exact")
    bad, right = answered("mine", "x", "bad"), answered("a", "12", "12")
    assert watching.grade([bad, right]) == [None, 1]
    assert watching.grade([bad, right]) == [None, 1]
    (said,) = watching.news()
    assert "training answers of mine are not graded now, and the run goes on" in said
    assert "rewards.watch" in said
    assert watching.news() == []
    with pytest.raises(ValueError, match="watched_rewards"):
        watcher(Grader, mine=f"watched_rewards:{function}").grade([bad])


def test_a_reward_may_work_again(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "watched_rewards", SimpleNamespace(**globals()))
    watching = watcher(mine="watched_rewards:raises")
    assert watching.grade([answered("mine", "x", "bad")]) == [None]
    assert watching.grade([answered("mine", "x", "good")]) == [0.5]
