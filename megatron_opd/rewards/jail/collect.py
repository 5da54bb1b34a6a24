"""Runs what a file of tests defines, by the rules of pytest and unittest, with the standard library alone.

That is: the module itself, `check(candidate)`, functions and methods named test*, classes Test* and TestCase; each may
be async. A run that never calls the answer is an error: nothing was tested.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import loops
import small_pytest

MODULES_OF_THE_ANSWER = ("solution", "answer", "candidate", "submission", "program", "your_module")
"""Modules that tests may import the answer's functions from, besides one named after the function."""

Functions = Mapping[str, Callable[..., Any]]


class CalledNothing(Exception):
    """The tests have passed without calling the answer."""


class Unusable(Exception):
    """The tests need what is not here."""


def run(tests: str, functions: Functions, *, entry_point: str | None, helpers: dict[str, Any]) -> None:
    """Run the tests against the functions. Raises what the first one that fails raises."""
    calls: list[str] = []
    functions = {name: _counted(name, function, calls) for name, function in functions.items()}
    module = _module("__main__", {**helpers, **functions})
    sys.modules["__main__"], sys.argv = module, ["tests"]
    for name in {*MODULES_OF_THE_ANSWER, entry_point or MODULES_OF_THE_ANSWER[0]} - set(sys.stdlib_module_names):
        sys.modules[name] = _module(name, functions)
    loops.prepare(tests)
    ended = _runners(tests)
    try:
        exec(compile(tests, "tests", "exec"), module.__dict__)
    except SystemExit:
        if not ended:  # sys.exit(unittest.main()) is how a file of tests ends
            raise
    _run_collected(module, functions, entry_point)
    if not calls:
        raise CalledNothing("they never call the answer")


def _module(name: str, content: Mapping[str, Any]) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(content, __name__=name)
    return module


def _counted(name: str, function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        calls.append(name)
        return function(*arguments, **keywords)

    async def wait(*arguments: Any, **keywords: Any) -> Any:
        calls.append(name)
        return await function(*arguments, **keywords)

    counted = wait if inspect.iscoroutinefunction(function) else call
    counted.__name__ = counted.__qualname__ = name
    return counted


def _runners(tests: str) -> list[str]:
    """Let unittest.main() and pytest.main() do nothing: all that there is runs afterwards. Returns whether one ran."""
    ended: list[str] = []

    def main(*arguments: Any, **keywords: Any) -> int:
        ended.append("main")
        return 0

    sys.modules["pytest"] = small_pytest.module(main)
    if "unittest" in tests:
        import unittest

        unittest.main = main  # type: ignore[assignment,misc]
    return ended


def _run_collected(module: types.ModuleType, functions: Functions, entry_point: str | None) -> None:
    namespace = module.__dict__
    check = namespace.get("check")
    if callable(check) and "check" not in functions:
        needed = _needed(check)
        if not needed or entry_point:
            _finished(check(*[functions[entry_point] for _ in needed[:1] if entry_point]))
    for name, value in list(namespace.items()):
        if name in functions or getattr(value, "__module__", None) != "__main__":
            continue
        if name.startswith("test") and inspect.isfunction(value):
            _run_function(value, namespace, functions, entry_point)
        elif inspect.isclass(value) and _is_test_case(value):
            _run_test_case(value)
        elif inspect.isclass(value) and name.startswith("Test") and "__init__" not in vars(value):
            _run_class(value, namespace, functions, entry_point)


def _needed(function: Callable[..., Any]) -> list[str]:
    """The parameters that a call must give."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    usual = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in usual and p.default is inspect.Parameter.empty]


def _finished(value: Any) -> Any:
    return loops.run(value) if inspect.iscoroutine(value) else value


def _run_function(
    function: Callable[..., Any], namespace: dict[str, Any], functions: Functions, entry_point: str | None
) -> None:
    if getattr(function, small_pytest.SKIPPED, False):
        return
    for case in small_pytest.cases(function):
        given = dict(case)
        for name in _needed(function):
            if name not in given:
                given[name] = _fixture(name, namespace, functions, entry_point)
        try:
            _finished(function(**given))
        except small_pytest.Skipped:
            continue


def _fixture(name: str, namespace: dict[str, Any], functions: Functions, entry_point: str | None) -> Any:
    """What a test's parameter of this name stands for."""
    if name in functions:
        return functions[name]
    made = namespace.get(name)
    if getattr(made, small_pytest.FIXTURE, False):
        value = made(**{inner: _fixture(inner, namespace, functions, entry_point) for inner in _needed(made)})
        return next(value) if inspect.isgenerator(value) else value
    if name == "candidate" and entry_point:
        return functions[entry_point]
    raise Unusable(f"a test takes {name}, and nothing here is a fixture of that name")


def _run_class(kind: type, namespace: dict[str, Any], functions: Functions, entry_point: str | None) -> None:
    """A class of pytest's: an instance for each method."""
    if getattr(kind, small_pytest.SKIPPED, False):
        return
    for name in dir(kind):
        if name.startswith("test") and callable(getattr(kind, name)):
            test = kind()
            for prepare in ("setup_class", "setup_method", "setUp"):
                if hasattr(test, prepare):
                    begin = getattr(test, prepare)
                    begin(*[None] * len(_needed(begin)))
            _run_function(getattr(test, name), namespace, functions, entry_point)


def _is_test_case(kind: type) -> bool:
    unittest = sys.modules.get("unittest")
    return unittest is not None and issubclass(kind, unittest.TestCase)


def _run_test_case(kind: type) -> None:
    """A class of unittest's, with its own loader. Raises the exception of the first test that fails."""
    import unittest

    result, raised = unittest.TestResult(), []

    def keep(test: Any, problem: Any, of_subtest: Any = None) -> None:
        if problem := of_subtest or (problem if isinstance(problem, tuple) else None):
            raised.append(problem[1])

    # In place of its own, which write tracebacks down: that looks for files, which the jail does not show.
    result.addError = result.addFailure = result.addSubTest = keep  # type: ignore[assignment,method-assign]
    unittest.defaultTestLoader.loadTestsFromTestCase(kind).run(result)
    for error in raised:
        raise error
    if result.unexpectedSuccesses:
        raise AssertionError("a test that should fail has passed")
