"""Which teacher is asked about which answers, and behind which prompt."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny

from megatron_opd.teachers import ask_all


def teacher(name, asked):
    """Notes what it is asked about, and says its name and the row of each."""

    def score(rollouts):
        asked[name] = [r.prompt.index for r in rollouts]
        return [(name, r.prompt.index) for r in rollouts]

    return SimpleNamespace(offloaded=None, score=score)


def test_answers_go_to_the_teachers_that_have_a_weight_and_scores_come_back_in_their_places():
    asked = {}
    weights = [[1.0, 0.0], [0.25, 0.75], [0.0, 1.0], [0.0, 0.0]]
    rollouts = [tiny.rollout((1,), (2,), index=i) for i in range(4)]
    found = ask_all([teacher("x", asked), teacher("y", asked)], rollouts, weights)
    assert asked == {"x": [0, 1], "y": [1, 2]}
    assert found == [[("x", 0), ("x", 1), None, None], [None, ("y", 1), ("y", 2), None]]


def test_every_teacher_is_asked_also_about_nothing():
    """It may be a collective."""
    asked = {}
    ask_all([teacher("x", asked), teacher("y", asked)], [tiny.rollout((1,), (2,))], [[0.0, 0.0]])
    assert asked == {"x": [], "y": []}


@pytest.mark.parametrize(("name", "ids"), [("x", (7, 8, 9)), ("y", (6,)), ("z", (1, 2))])
def test_each_teacher_has_the_prompt_of_its_own_or_the_students(name, ids):
    rollout = tiny.rollout((1, 2), (3, 4))
    rollout = replace(rollout, prompt=replace(rollout.prompt, teacher_ids={"x": (7, 8, 9), "y": (6,)}))
    assert rollout.prompt.seen_by(name).token_ids == ids
    assert rollout.seen_by(name).prompt.token_ids == ids
    assert rollout.seen_by(name).token_ids == (3, 4)
