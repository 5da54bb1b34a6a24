"""Tests of rows run as pytest and unittest would run them; those that cannot fail are refused before a run."""

import pytest

from megatron_opd.config import RewardsConfig, SourceConfig
from megatron_opd.core.types import Prompt
from megatron_opd.rewards import build_reward
from megatron_opd.trainer.reward_trial import problems_of_rows

REWARD = build_reward("code", RewardsConfig(code_timeout_s=60.0))
RIGHT, WRONG = "def cube(x):\n    return x ** 3\n", "def cube(x):\n    return x * 3\n"


def row(tests, *, index=0, entry_point="cube", text=""):
    return Prompt(source="s", index=index, text=text, token_ids=(), extra={"tests": tests, "entry_point": entry_point})


THAT_CAN_FAIL = {
    "bare asserts": "assert cube(2) == 8",
    "a test function": "def test_cube():\n    assert cube(2) == 8",
    "an import": "from solution import cube\ndef test():\n    assert cube(2) == 8",
    "a module": "import solution\nassert solution.cube(2) == 8",
    "a TestCase": (
        "import unittest\nclass Cubes(unittest.TestCase):\n    def setUp(self): self.x = 2\n"
        "    def test_two(self): self.assertEqual(cube(self.x), 8)\n"
    ),
    "unittest.main()": (
        "import unittest\nfrom solution import cube\nclass T(unittest.TestCase):\n"
        "    def test_two(self):\n        for x, y in ((1, 1), (2, 8)):\n"
        "            with self.subTest(x): self.assertEqual(cube(x), y)\n"
        "if __name__ == '__main__':\n    unittest.main()\n"
    ),
    "a guarded main": "if __name__ == '__main__':\n    assert cube(2) == 8",
    "an async check": "async def check(candidate):\n    assert candidate(2) == 8",
    "an async test": "import asyncio\nasync def test_it():\n    await asyncio.sleep(0)\n    assert cube(2) == 8",
    "an async TestCase": (
        "import unittest\nclass T(unittest.IsolatedAsyncioTestCase):\n    async def test_it(self):\n"
        "        self.assertEqual(cube(2), 8)\n"
    ),
    "a class of pytest": "class TestCube:\n    def setup_method(self): self.y = 8\n"
    "    def test_it(self): assert cube(2) == self.y",
    "parametrize": (
        "import pytest\n@pytest.mark.parametrize('x, y', [(1, 1), (2, 8), pytest.param(3, 27)])\n"
        "def test_it(x, y): assert cube(x) == pytest.approx(y)\n"
    ),
    "a fixture": "import pytest\n@pytest.fixture\ndef two(): yield 2\ndef test_it(two): assert cube(two) == 8",
    "check without a parameter": "def check():\n    assert cube(2) == 8",
    "sys.exit of main": "import sys, pytest\ndef test(): assert cube(2) == 8\nsys.exit(pytest.main([__file__]))"
    .replace("__file__", "'x'"),
}  # fmt: skip


@pytest.mark.parametrize("tests", THAT_CAN_FAIL.values(), ids=THAT_CAN_FAIL)
def test_they_pass_what_is_right_and_fail_what_is_wrong(tests):
    prompt = row(tests)
    REWARD.check(prompt)
    assert REWARD.grade([(prompt, RIGHT), (prompt, WRONG), (prompt, "")]) == [1, 0, 0]
    assert REWARD.trial(prompt) is None


THAT_CANNOT_FAIL = {
    "a comment": ("# cube(2) is 8", "never call the answer"),
    "a comparison that is not asserted": ("cube(2) == 8", "whatever the answer returns"),
    "a function that nobody calls": ("def verify():\n    assert cube(2) == 8", "never call the answer"),
    "a test that asserts nothing": ("def test_cube():\n    print(cube(2))", "whatever the answer returns"),
    "an assert that is caught": ("try:\n    assert cube(2) == 8\nexcept AssertionError:\n    pass", "whatever"),
    "the answer compared with itself": ("assert cube(2) == cube(2)", "whatever the answer returns"),
    "a tuple": ("assert (cube(2) == 8, 'wrong')", "whatever the answer returns"),
    "another class": ("class Cubes:\n    def test_it(self): assert cube(2) == 8", "never call the answer"),
    "a skipped test": ("import pytest\n@pytest.mark.skip\ndef test(): assert cube(2) == 8", "never call the answer"),
    "an own solution": ("def cube(x): return x ** 3\nassert cube(2) == 8", "never call the answer"),
    "a fixture that is not there": ("def test_it(tmp_path): assert cube(2) == 8", "tmp_path"),
}


@pytest.mark.parametrize(("tests", "why"), THAT_CANNOT_FAIL.values(), ids=THAT_CANNOT_FAIL)
def test_rows_whose_tests_cannot_fail_are_refused(tests, why):
    assert why in REWARD.trial(row(tests))


@pytest.mark.parametrize("name", ["a comment", "a function that nobody calls", "another class", "a skipped test"])
def test_and_nothing_passes_them(name):
    assert REWARD.grade([(row(THAT_CANNOT_FAIL[name][0]), RIGHT)]) == [0]


def test_tests_without_an_entry_point_are_tried_with_the_names_that_they_use():
    assert REWARD.trial(row("def test(): assert cube(2) == 8", entry_point=None)) is None
    assert "whatever" in REWARD.trial(row("import math\nmath.floor(1.5)\ncube(2)", entry_point=None))


def test_an_async_answer():
    prompt = row("async def check(candidate):\n    assert await candidate(2) == 8")
    assert REWARD.grade(
        [(prompt, "import asyncio\nasync def cube(x):\n    await asyncio.sleep(0)\n    return x**3")]
    ) == [1]
    uses_a_loop = "import asyncio\nasync def f(x): return x**3\ndef cube(x): return asyncio.run(f(x))"
    assert REWARD.grade([(row("assert cube(2) == 8"), uses_a_loop)]) == [1]


def test_tests_that_import_what_is_not_there_are_refused():
    with pytest.raises(ValueError, match="import numpy; the sandbox has only"):
        REWARD.check(row("import numpy as np\nassert cube(2) == np.int64(8)"))
    REWARD.check(row("from cube import cube\nimport math, os.path\nassert cube(2) == 8"))


def test_the_rows_of_a_source_are_named_and_only_some_are_tried():
    source = SourceConfig(name="tasks", path="tasks.jsonl")
    prompts = [row("x", index=i) for i in range(10)]
    trial = lambda prompt: "no" if prompt.index in (4, 8) else None  # noqa: E731
    problems, note = problems_of_rows(source, prompts, trial, most=10, workers=2)
    assert problems == ["tasks.jsonl, row 5: no", "tasks.jsonl, row 9: no"]
    assert note is None
    problems, note = problems_of_rows(source, prompts, trial, most=3, workers=2)
    assert problems == ["tasks.jsonl, row 5: no", "tasks.jsonl, row 9: no"]
    assert note == "tasks: the tests of 3 of 10 rows were tried"
    problems, _ = problems_of_rows(source, prompts, lambda prompt: "no", most=10, workers=2)
    assert problems[-1] == "tasks.jsonl: 7 more rows of 10 that were tried are like that"
