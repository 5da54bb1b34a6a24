"""An answer to a programming task counts by what it defines, however it is written."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from megatron_opd.config import RewardsConfig
from megatron_opd.core.types import Prompt
from megatron_opd.rewards import build_reward
from megatron_opd.rewards.sandbox import JAIL
from megatron_opd.rewards.thinking import after_thinking

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import check_rewards as ways_tool

PATIENT = RewardsConfig(code_timeout_s=60.0)
ROWS = [json.loads(line) for line in Path(__file__).with_name("problems.jsonl").read_text().splitlines()]


def jail_module(name):
    spec = importlib.util.spec_from_file_location(f"jail_{name}", JAIL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    return module


PROGRAMS = jail_module("programs")


def first_reading(prompt, answer, entry_point):
    """What the best reading defines; run here, because all of it is ours."""
    found = PROGRAMS.readings(prompt, answer, entry_point)
    if not found:
        return {}
    namespace = {"__name__": "answer"}
    for cell in found[0]:
        try:
            exec(compile(cell, "answer", "exec"), namespace)
        except Exception:
            continue
    return namespace


@pytest.mark.parametrize("way", ways_tool.WAYS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["entry_point"])
def test_every_way_of_writing_a_solution_is_read_as_it(row, way):
    answer = after_thinking(ways_tool.WAYS[way](row))
    function = first_reading(row["prompt"], answer, row["entry_point"])[row["entry_point"]]
    tests = {"__name__": "tests"}
    exec(row["prompt"], tests)
    exec(row["test"], tests)
    tests["check"](function)


def test_the_tool_grades_in_the_sandbox(capsys, tmp_path):
    way = ways_tool.WAYS["a program in a block, then an example of use"]
    assert ways_tool.wrong(ROWS[:2], way, PATIENT) == []
    assert ways_tool.wrong(ROWS[:1], lambda row: "    return values", PATIENT) == ["clamp_all"]


STUB = 'def half(x):\n    """x / 2"""\n'


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("```py\ndef half(x): return x / 2\n```\nNot this:\n```bash\npip install half\n```", 2.0),
        ("```python\ndef half(x): return x // 3\n```\nNo, better:\n```python\ndef half(x): return x / 2\n```", 2.0),
        ("```python\ndef half(x):\n    ...\n```\nbecomes\n```python\ndef half(x): return x / 2\n```", 2.0),
        ("```python\ndef half(x): return x / 2\n```\nso, in short\n```python\ndef half(x): ...\n```", 2.0),
        ("~~~\n  return x / 2\n~~~", 2.0),
        ("> ```python\n> def half(x):\n>     return x / 2\n> ```", 2.0),
        ("```def half(x): return x / 2```", None),
        ("```python def half(x): return x / 2```", 2.0),
        ("- So:\n  ```python\n  def half(x):\n      return x / 2\n  ```\n- Done.", 2.0),
        ("````md\n```python\ndef half(x): return 0\n```\n````\n```python\ndef half(x): return x / 2\n```", 2.0),
        ("Use a helper.\n\nimport math\n\ndef two(): return 2\n\nThen:\n\n"
         "def half(x):\n    return x / two()\n\nIt's done!", 2.0),
        ("\r\n    return x / 2\r\n", 2.0),
        ("    return x / 2\n\ndef half(x):\n    return 7\n", 2.0),
        ("    y = x / 2\n    return y\n\nassert half(4) == 3", 2.0),
        ("half = lambda x: x / 2", 2.0),
        ("```\n>>> half(4)\n2.0\n```\n```\ndef half(x):\n    return x / 2\n```", 2.0),
        ("```python\nimport numpy_that_is_not_there\n```\n```python\ndef half(x): return x / 2\n```", 2.0),
        ("```python\ndef half(x):\n    return x / 2\nprint(half('a'))\n```", 2.0),
        ("I cannot do that.", None),
        ("", None),
        ("```\n```", None),
        ("def double(x): return 2 * x", None),
    ],
)  # fmt: skip
def test_what_an_answer_defines(answer, expected):
    half = first_reading(STUB, answer, "half").get("half")
    assert (half(4) if half else None) == expected


def test_a_prompt_in_prose_with_a_block_may_be_continued():
    prompt = "Complete this:\n```python\nimport math\n\ndef root(x):\n    '''Square root.'''\n```\n"
    for answer in (
        "    return math.sqrt(x)",
        "```python\nreturn math.sqrt(x)\n```",
        "def root(x):\n    return math.sqrt(x)",
    ):
        assert first_reading(prompt, answer, "root")["root"](9) == 3, answer


def test_a_hostile_text_defines_nothing():
    texts = ["(" * 9999, "```\n" * 999, "def f(:\n" * 300, "x = '''\n" * 99, "\0", "a\n" * 10**6]
    for answer in texts:
        found = PROGRAMS.readings("Write half(x).", answer, "half")
        assert all("half" not in cells[-1] for cells in found), answer[:20]


def test_the_namespace_of_a_failed_reading_is_not_kept():
    row = Prompt(
        source="s", index=0, text=STUB, token_ids=(), extra={"tests": "assert half(4) == 2", "entry_point": "half"}
    )
    answers = ["import os\nos._exit(0)\ndef half(x): return x / 2", "raise ValueError\ndef half(x): return x / 2"]
    assert build_reward("code", PATIENT).grade([(row, answer) for answer in answers]) == [0, 0]
