"""The rule by which cases are chosen: each pair of values is in a case that `make test` runs, and none is lost."""

import itertools

import pairwise
import pytest

AXES = (("a", "b", "c"), (0, 1, 2), (True, False), ("x", "y"))
LAYOUTS = {
    "tp1": {},
    "tp2": {"tensor": 2},
    "tp4": {"tensor": 4},
    "pp2": {"pipeline": 2},
    "tp2pp2": {"tensor": 2, "pipeline": 2},
    "tp2sp": {"tensor": 2, "sequence": True},
}


def marks(case):
    return [mark.name for mark in case.marks]


def quick(cases):
    return [case for case in cases if "slow" not in marks(case)]


def test_every_pair_of_a_product_stays():
    made = pairwise.thin(pairwise.product(*AXES))
    kept = [case.values for case in quick(made)]
    for (i, one), (j, other) in itertools.combinations(enumerate(AXES), 2):
        assert {(case[i], case[j]) for case in kept} == set(itertools.product(one, other))
    assert len(kept) <= 12 < len(made) == 36


def test_all_cases_are_left_for_test_all_with_their_names_and_marks():
    mine = [pytest.param(1, 2, id="first", marks=pytest.mark.gpu), (3, 4)]
    made = pairwise.thin(mine + mine)
    assert [case.values for case in made] == [(1, 2), (3, 4)] * 2
    assert [case.id for case in made] == ["first", None] * 2
    assert [marks(case) for case in made] == [["gpu"], [], ["gpu", "slow"], ["slow"]]


def test_a_layout_is_an_axis_a_setting():
    made = pairwise.thin(pairwise.product(("llama", "qwen3", "moe"), LAYOUTS))
    kept = [case.values for case in quick(made)]
    for family in ("llama", "qwen3", "moe"):
        layouts = [layout for name, layout in kept if name == family]
        assert {layout.get("tensor") for layout in layouts} == {None, 2, 4}
        assert {layout.get("pipeline") for layout in layouts} == {None, 2}
        assert {layout.get("sequence") for layout in layouts} == {None, True}
    assert {str(layout) for _, layout in kept} >= {str(LAYOUTS["tp2pp2"]), str(LAYOUTS["tp2sp"])}
    assert len(kept) < len(made)


def test_names_of_a_product():
    made = pairwise.product([{"tensor": 1}, None], {"of two": 2})
    assert [case.id for case in made] == ["{'tensor': 1}-of two", "None-of two"]


def test_the_choice_is_the_same_every_time():
    """Workers of one session must agree on what there is to run."""
    cases = [case.values for case in pairwise.product(*AXES, LAYOUTS)]
    assert pairwise.cover(cases) == pairwise.cover(cases)


@pytest.mark.parametrize("cases", [[], [(1,)], [(1,), (2,)], [(1, 2)]])
def test_few_cases_are_all_needed(cases):
    assert pairwise.cover(cases) == set(range(len(cases)))
