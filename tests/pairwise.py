"""Fewer cases for `make test`, chosen by a rule: every pair of values that some case has, one of those left has too.

`thin` keeps all cases and marks those that the rule does not need `slow`, so that `make test-all` runs each of them:

    @pytest.mark.parametrize(("family", "layout"), pairwise.thin(pairwise.product(FAMILIES, LAYOUTS)))

Values of a case are its arguments; an argument that is a mapping has a value a key, so that the layouts tp2, pp2 and
tp2pp2 are two axes and not three values of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

LAYOUTS = {
    "tp1": {"tensor": 1},
    "tp2": {"tensor": 2},
    "tp4": {"tensor": 4},
    "pp2": {"pipeline": 2},
    "tp2pp2": {"tensor": 2, "pipeline": 2},
}
"""The layouts of dense models without sequence parallelism."""
Value = tuple[Any, ...]
"""Where it stands in a case, and what stands there."""


def product(*axes: Sequence[Any] | Mapping[str, Any]) -> list[Any]:
    """All combinations, the last axis fastest, as cases of one `parametrize`; a mapping gives names to its values."""
    named = [list(axis.items()) if isinstance(axis, Mapping) else [(_name(v), v) for v in axis] for axis in axes]
    return [
        pytest.param(*(value for _, value in one), id="-".join(name for name, _ in one))
        for one in itertools.product(*named)
    ]


def named(cases: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Cases with their names."""
    return [pytest.param(*case, id=name) for name, case in cases.items()]


def thin(cases: Iterable[Any]) -> list[Any]:
    """The same cases in the same order, with `slow` on those that `cover` leaves out."""
    made = [case if hasattr(case, "values") and hasattr(case, "marks") else pytest.param(*case) for case in cases]
    kept = cover([case.values for case in made])
    return [
        case if i in kept else pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
        for i, case in enumerate(made)
    ]


def cover(cases: Sequence[Sequence[Any]]) -> set[int]:
    """The numbers of cases that together have every pair of values that occurs. Greedy; the first case wins a tie."""
    pairs = pairs_of(cases)
    left, kept = set().union(*pairs), set()
    while left:
        best = max(range(len(cases)), key=lambda i: (len(pairs[i] & left), -i))
        kept.add(best)
        left -= pairs[best]
    return kept


def pairs_of(cases: Sequence[Sequence[Any]]) -> list[set[frozenset[Value]]]:
    """The pairs of values of each case, and its values alone. That a mapping lacks a key is a value, too."""
    keys = {(i, key) for case in cases for i, a in enumerate(case) if isinstance(a, Mapping) for key in a}
    return [set(map(frozenset, itertools.combinations_with_replacement(_values(case, keys), 2))) for case in cases]


def _values(case: Sequence[Any], keys: set[tuple[int, str]]) -> list[Value]:
    plain = [(i, repr(a)) for i, a in enumerate(case) if not isinstance(a, Mapping)]
    mapped = [(i, key, repr(case[i].get(key))) for i, key in sorted(keys) if isinstance(case[i], Mapping)]
    return plain + mapped


def _name(value: Any) -> str:
    return value.__name__ if hasattr(value, "__name__") else str(value)
