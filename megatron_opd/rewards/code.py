"""Right is a program that passes its tests, run in the sandbox of `sandbox.py`.

A row has `tests` and, where they test one function, its name as `entry_point`. The tests are asserts, a function
`check(candidate)` as in HumanEval (Chen et al. 2021, arXiv:2107.03374), or what pytest or unittest would collect. The
program is what the answer defines, in blocks of code or without, alone or as the rest of the prompt's function.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_opd.config import RewardsConfig
from megatron_opd.core.types import Prompt
from megatron_opd.rewards import sandbox
from megatron_opd.rewards.base import Answer, Reward

_NOT_OF_PYTHON = ("pytest", "solution", "answer", "candidate", "submission", "program", "your_module")
"""Modules that tests may import all the same: the sandbox has something for each."""


def build(settings: RewardsConfig) -> Reward:
    """The reward, after a look whether code can be confined here. Raises ValueError when it cannot."""
    guards = _guards()
    limits = sandbox.SandboxLimits(timeout_s=settings.code_timeout_s, memory_mb=settings.code_memory_mb)
    missing = [guard for guard in sandbox.GUARDS if guard not in guards]
    without = f"; not available here: {', '.join(missing)} (docs/rewards.md says what that leaves open)"
    return Reward(
        name="code",
        grade=functools.partial(_grade, limits=limits, workers=settings.code_workers),
        check=check,
        trial=functools.partial(_trial, limits=limits),
        fields=("tests", "entry_point"),
        note=f"code runs confined by limits, {', '.join(guards)}{without if missing else ''}",
    )


@functools.cache
def _guards() -> tuple[str, ...]:
    verdict = sandbox.run(
        sandbox.Task(programs=("def f(): return 1",), tests="assert f() == 1"), sandbox.SandboxLimits(timeout_s=60.0)
    )
    if not verdict.passed:
        raise sandbox.SandboxError(f"code cannot be run here: the sandbox failed at an empty program: {verdict.why}")
    return verdict.guards


def _grade(answers: Sequence[Answer], *, limits: sandbox.SandboxLimits, workers: int) -> list[float]:
    with ThreadPoolExecutor(workers, thread_name_prefix="code-reward") as pool:
        verdicts = pool.map(lambda answer: sandbox.run(task(*answer), limits), answers)
        return [float(verdict.passed) for verdict in verdicts]


def _trial(prompt: Prompt, *, limits: sandbox.SandboxLimits) -> str | None:
    why = _tried(dataclasses.replace(task(prompt, ""), answer=None), limits)
    return f'the "tests" cannot tell a right answer from a wrong one: {why}' if why else None


@functools.lru_cache(maxsize=65536)
def _tried(of: sandbox.Task, limits: sandbox.SandboxLimits) -> str | None:
    return sandbox.probe(of, limits)


def task(prompt: Prompt, text: str) -> sandbox.Task:
    """What the sandbox is given for a response."""
    return sandbox.Task(
        answer=text, tests=prompt.extra["tests"], entry_point=prompt.extra.get("entry_point"), prompt=prompt.text
    )


def check(prompt: Prompt) -> None:
    """Raises ValueError when the row has no tests, or no function to test."""
    tests, entry_point = prompt.extra.get("tests"), prompt.extra.get("entry_point")
    if not isinstance(tests, str) or not tests.strip():
        raise ValueError('the reward code needs a text field "tests"')
    if entry_point is not None and not (isinstance(entry_point, str) and entry_point.isidentifier()):
        raise ValueError('"entry_point" must be the name of a function')
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f'"tests" are not Python: {error}') from None
    if entry_point is None and any(_takes_a_candidate(node) for node in tree.body):
        raise ValueError('the "tests" define check(candidate), so the row needs "entry_point", the function to check')
    for module in _imported(tree):
        if module not in (*sys.stdlib_module_names, *_NOT_OF_PYTHON, entry_point):
            raise ValueError(
                f'the "tests" import {module}; the sandbox has only Python\'s standard library, and the answer as the'
                " module solution"
            )


def _takes_a_candidate(node: ast.stmt) -> bool:
    is_check = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "check"
    return is_check and len(node.args.args) > len(node.args.defaults)


def _imported(tree: ast.Module) -> list[str]:
    """The modules that the tests import without a choice, by their first names."""
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [name.split(".")[0] for name in names]
