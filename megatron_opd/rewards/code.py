"""Right is a program that passes its tests, run in the sandbox of `sandbox.py`.

As in HumanEval (Chen et al. 2021, arXiv:2107.03374) the program is the prompt continued by the response, up to the
first of their stop sequences where the whole does not run. A response with a fenced block, or one that is a program
by itself, counts as that. A row has `tests` (asserts, or a function `check(candidate)`) and `entry_point`, the
function that they test.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_opd.config import RewardsConfig
from megatron_opd.core.types import Prompt
from megatron_opd.rewards import sandbox
from megatron_opd.rewards.base import Answer, Reward

_FENCED = re.compile(r"^```[^\n`]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
_STOPS = re.compile(r"\n(?:class |def |#|if |print\()")


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
        fields=("tests", "entry_point"),
        note=f"code runs confined by limits, {', '.join(guards)}{without if missing else ''}",
    )


@functools.cache
def _guards() -> tuple[str, ...]:
    verdict = sandbox.run(sandbox.Task(programs=("",), tests=""), sandbox.SandboxLimits(timeout_s=60.0))
    if not verdict.passed:
        raise sandbox.SandboxError(f"code cannot be run here: the sandbox failed at an empty program: {verdict.why}")
    return verdict.guards


def _grade(answers: Sequence[Answer], *, limits: sandbox.SandboxLimits, workers: int) -> list[float]:
    with ThreadPoolExecutor(workers, thread_name_prefix="code-reward") as pool:
        verdicts = pool.map(lambda answer: sandbox.run(task(*answer), limits), answers)
        return [float(verdict.passed) for verdict in verdicts]


def task(prompt: Prompt, text: str) -> sandbox.Task:
    """What the sandbox is given for a response."""
    blocks = _FENCED.findall(text)
    code = blocks[-1] if blocks else text
    cut = _STOPS.split(code, maxsplit=1)[0]
    programs = (prompt.text + code, prompt.text + cut, code, cut)
    return sandbox.Task(
        programs=tuple(dict.fromkeys(programs)),
        tests=prompt.extra["tests"],
        entry_point=prompt.extra.get("entry_point"),
        prompt=prompt.text,
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
    if entry_point is None and any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body):
        raise ValueError('the "tests" define check(candidate), so the row needs "entry_point", the function to check')
