"""The little of pytest that files of tests for functions use: raises, approx, parametrize, fixtures, skips."""

from __future__ import annotations

import contextlib
import itertools
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

SKIPPED, FIXTURE, _CASES = "_is_skipped", "_is_fixture", "_cases"


class Skipped(Exception):
    """A test that says that it does not apply."""


def module(main: Callable[..., int]) -> types.ModuleType:
    """A module that answers to `import pytest`."""
    made = types.ModuleType("pytest")
    made.__dict__.update(
        raises=_raises, approx=_Approx, mark=_Marks(), fixture=_fixture, param=_param, skip=_skip, fail=_fail, main=main
    )
    return made


def cases(function: Callable[..., Any]) -> list[dict[str, Any]]:
    """The arguments of each call that parametrize asks for; one call without any where there is none."""
    lists: list[list[dict[str, Any]]] = getattr(function, _CASES, [])
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*lists)]


class _Marks:
    def __getattr__(self, name: str) -> Any:
        marks = {"parametrize": _parametrize, "skip": _always_skip, "skipif": _skip_if, "xfail": _always_skip}
        return marks.get(name, _no_mark)


def _no_mark(*arguments: Any, **keywords: Any) -> Any:
    return arguments[0] if len(arguments) == 1 and callable(arguments[0]) else lambda function: function


def _always_skip(*arguments: Any, **keywords: Any) -> Any:
    if len(arguments) == 1 and callable(arguments[0]):
        setattr(arguments[0], SKIPPED, True)
        return arguments[0]
    return _always_skip


def _skip_if(condition: Any, **keywords: Any) -> Any:
    return _always_skip if condition else _no_mark()


def _parametrize(names: Any, values: Any, **keywords: Any) -> Callable[[Any], Any]:
    listed = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    found = [dict(zip(listed, value if len(listed) > 1 else _alone(value), strict=True)) for value in values]

    def mark(function: Any) -> Any:
        setattr(function, _CASES, [*getattr(function, _CASES, []), found])
        return function

    return mark


class _Param(tuple):
    """Arguments given by pytest.param."""


def _alone(value: Any) -> tuple[Any, ...]:
    return tuple(value) if type(value) is _Param else (value,)


def _param(*values: Any, **keywords: Any) -> _Param:
    return _Param(values)


def _fixture(*arguments: Any, **keywords: Any) -> Any:
    if len(arguments) == 1 and callable(arguments[0]):
        setattr(arguments[0], FIXTURE, True)
        return arguments[0]
    return _fixture


def _skip(reason: str = "", **keywords: Any) -> None:
    raise Skipped(reason)


def _fail(reason: str = "", **keywords: Any) -> None:
    raise AssertionError(reason)


def _raises(expected: Any, *arguments: Any, match: str | None = None, **keywords: Any) -> Any:
    if arguments:
        with _expected(expected, match):
            arguments[0](*arguments[1:], **keywords)
        return None
    return _expected(expected, match)


@contextlib.contextmanager
def _expected(expected: Any, match: str | None) -> Iterator[types.SimpleNamespace]:
    info = types.SimpleNamespace(value=None, type=None)
    try:
        yield info
    except expected as error:
        info.value, info.type = error, type(error)
        if match is not None and not re.search(match, str(error)):
            raise AssertionError(f"{str(error)[:80]!r} does not match {match!r}") from None
    else:
        raise AssertionError(f"did not raise {expected}")


class _Approx:
    """A number, or numbers in a list, tuple or dict, that may differ a little."""

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None, **keywords: Any) -> None:
        self.expected, self.rel, self.abs = expected, 1e-6 if rel is None and abs is None else rel or 0.0, abs or 1e-12

    def __eq__(self, other: Any) -> bool:
        return self._close(self.expected, other)

    __hash__ = None  # type: ignore[assignment]

    def _close(self, expected: Any, other: Any) -> bool:
        if isinstance(expected, dict):
            return (
                isinstance(other, dict)
                and expected.keys() == other.keys()
                and all(self._close(value, other[key]) for key, value in expected.items())
            )
        if isinstance(expected, list | tuple):
            return (
                isinstance(other, list | tuple)
                and len(expected) == len(other)
                and all(map(self._close, expected, other))
            )
        try:
            return bool(expected == other or abs(expected - other) <= max(self.abs, self.rel * abs(expected)))
        except TypeError:
            return False
