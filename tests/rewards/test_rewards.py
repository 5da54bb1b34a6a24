"""Rewards: what each calls right, what it needs of a row, and what it says when it cannot work."""

import gzip
import json
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_opd.config import RewardsConfig, SourceConfig
from megatron_opd.config.data import REWARDS, problem_with_reward
from megatron_opd.core.types import Prompt
from megatron_opd.prompts.mix import Limit, read_prompts
from megatron_opd.rewards import build_reward
from megatron_opd.rewards.gsm8k import final_number

PUBLIC_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PATIENT = RewardsConfig(code_timeout_s=60.0)
BYTES = SimpleNamespace(
    render=lambda asked: asked, encode=lambda texts: [list(text.encode()) for text in texts], kept=lambda asked: ()
)


def asked(text="?", answer=None, **extra):
    return Prompt(source="s", index=6, text=text, token_ids=(1,), answer=answer, extra=extra)


def test_names():
    assert [problem_with_reward(name) for name in (*REWARDS, "mine:score", "my.package:score")] == [None] * 9
    for name in ("gsm8", "", ":f", "m:", "m:f:g", "a b:c", "m:f()"):
        known = "known: exact, gsm8k, math, code, ifeval, environment, none, or a function"
        assert problem_with_reward(name).startswith(f"there is no reward '{name}'; {known}")
    assert "did you mean 'gsm8k'?" in problem_with_reward("gsm8")
    with pytest.raises(ValueError, match="there is no reward"):
        build_reward("gsm8")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 5 + 13 = 18\n#### 18", 18),
        ("#### 18 dollars, in 2 days", 18),
        ("#### 1\nno:\n#### $1,234,567.50\n", Fraction("1234567.5")),
        ("#### -7", -7), ("#### −7", -7), ("#### -$7", -7), ("#### $-7", -7), ("16-3", 3), ("16 - 3 = 13.", 13),
        ("costs $5.", 5), ("12%", 12), ("5kg", 5), (".5 or 0.25", Fraction(1, 4)), ("1,2", 2), ("3, 4 and 1,000", 1000),
        ("#### 1/2", Fraction(1, 2)), (r"\boxed{\frac{3}{4}} of 9", Fraction(3, 4)),
        (r"so \boxed{1{,}234\text{ m}} in 3 days", 1234), (r"\boxed{4} \boxed{x = 5}", 5), (r"\boxed{?} 8", 8),
        ("####\n9", 9), ("none", None), ("", None), ("1/0", None), ("9" * 9999, None),
    ],
)  # fmt: skip
def test_the_final_number(text, number):
    assert final_number(text) == number


def test_exact_is_all_of_the_answer_and_nothing_else():
    reward = build_reward("exact")
    said = ["yes", " yes\n", "yes, sir", "oh yes", "ye", "YES", ""]
    assert reward.grade([(asked(answer=" yes "), text) for text in said]) == [1, 1, 0, 0, 0, 0, 0]


def test_no_number_is_not_right_where_the_reference_has_none_either():
    assert build_reward("gsm8k").grade([(asked(answer="none"), "nothing"), (asked(), "")]) == [0, 0]


def test_gsm8k():
    reward = build_reward("gsm8k")
    prompt = asked(answer="2 * 500 = <<2*500=1000>>1000\n#### 1,000")
    said = ["It is 1000.00!", "#### 1000", "#### 1001\nor 1000", "", "1000.001"]
    assert reward.grade([(prompt, text) for text in said]) == [1, 1, 0, 0, 0]
    reward.check(prompt)
    with pytest.raises(ValueError, match="needs a number"):
        reward.check(asked(answer="many"))


@pytest.mark.parametrize("name", ["exact", "gsm8k"])
def test_without_an_answer(name):
    with pytest.raises(ValueError, match='a text field "answer"'):
        build_reward(name).check(asked())


STUB = 'def add(a, b):\n    """The sum."""\n'
TESTS = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n"


@pytest.mark.parametrize(
    ("prompt", "response", "reward"),
    [
        (STUB, "    return a + b\n", 1),
        (STUB, "    return a - b\n", 0),
        (STUB, "", 0),
        (STUB, "    return a + b\n\nprint(add(1, 'x'))", 1),  # cut where HumanEval cuts
        (STUB, "    return a + b\n\ndef next(:", 1),
        (STUB, "def add(a, b):\n    return a + b", 1),
        (STUB, "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds.", 1),
        (STUB, "```\n    return a + b\n```", 1),
        (
            "Write add(a, b).",
            "```python\ndef add(a, b):\n    return 1\n```\nbetter:\n```python\nadd = int.__add__\n```",
            1,
        ),
        ("Write add(a, b).", "def add(a, b): return a + b", 1),
        ("Write add(a, b).", "I cannot.", 0),
    ],
)
def test_code(prompt, response, reward):
    row = asked(prompt, tests=TESTS, entry_point="add")
    assert build_reward("code", PATIENT).grade([(row, response)]) == [reward]


def test_code_keeps_the_order_of_many():
    row = asked(STUB, tests=TESTS, entry_point="add")
    answers = [(row, f"    return a {sign} b") for sign in "+-*++/"]
    assert build_reward("code", PATIENT).grade(answers) == [1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, 'needs a text field "tests"'),
        ({"tests": " "}, 'needs a text field "tests"'),
        ({"tests": ["assert 1"]}, 'needs a text field "tests"'),
        ({"tests": "assert ("}, "not Python"),
        ({"tests": "assert f()", "entry_point": "f()"}, "name of a function"),
        ({"tests": TESTS}, 'the row needs "entry_point"'),
    ],
)
def test_rows_that_code_cannot_use(extra, message):
    with pytest.raises(ValueError, match=message):
        build_reward("code").check(asked(**extra))
    build_reward("code").check(asked(tests="assert f() == 1"))


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_for_tests.py").write_text(
        "def length(prompt, text): return min(len(text) / prompt.extra['most'], 1)\n"
        "def large(prompt, text): return 1.5\n"
        "def vague(prompt, text): return None\n"
        "def broken(prompt, text): raise KeyError('x')\n"
        "def quits(prompt, text): raise SystemExit(0)\n"
        "number = 3\n"
    )
    (tmp_path / "my_script_for_tests.py").write_text("def right(prompt, text): return 1\nraise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return "my_rewards_for_tests"


def test_a_function_of_the_users_own(module, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "?", "answer": "!", "most": 4, "other": [1]}')
    reward = build_reward(f"{module}:length")
    source = SourceConfig(name="s", path=str(path))
    (prompt,) = read_prompts(source, BYTES, limit=Limit(9, ""), reward=reward, is_graded=True)
    assert prompt.extra == {"most": 4, "other": [1]}
    assert reward.grade([(prompt, "ab"), (prompt, "abcdef")]) == [0.5, 1]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("large", "number from 0 to 1, not 1.5"),
        ("vague", "not None"),
        ("broken", r"KeyError\('x'\)"),
        ("quits", r"SystemExit\(0\)"),
    ],
)
def test_a_function_that_fails_is_named_with_the_line(module, function, message):
    with pytest.raises(ValueError, match=rf"{module}:{function}', prompt source 's', line 7: .*{message}"):
        build_reward(f"{module}:{function}").grade([(asked(), "")])


@pytest.mark.parametrize("name", ["no_such_module:f", "{}:no_such", "{}:number", "my_script_for_tests:right"])
def test_a_function_that_is_not_there(module, name):
    with pytest.raises(ValueError, match=r"cannot be imported|has no function"):
        build_reward(name.format(module))


def public(*path):
    place = PUBLIC_DATA.joinpath(*path)
    if not place.is_file():
        pytest.skip("the public data set is not here")
    with gzip.open(place, "rt") if place.suffix == ".gz" else place.open() as lines:
        return [json.loads(line) for line in lines]


def test_gsm8k_of_the_data_set():
    """Every reference is a number, and earns the reward against itself however it is written."""
    reward = build_reward("gsm8k")
    for row in public("gsm8k", "test.jsonl"):
        prompt, number = asked(row["question"], row["answer"]), row["answer"].rpartition("####")[2].strip()
        reward.check(prompt)
        said = [row["answer"], f"So it is ${number}.", rf"\boxed{{{number}}}", f"{number}1"]
        assert reward.grade([(prompt, text) for text in said]) == [1, 1, 1, 0], number


def test_humaneval_of_the_data_set():
    reward, answers = build_reward("code", PATIENT), []
    for row in public("humaneval", "HumanEval.jsonl.gz")[::9]:
        prompt = asked(row["prompt"], tests=row["test"], entry_point=row["entry_point"])
        reward.check(prompt)
        answers += [(prompt, row["canonical_solution"]), (prompt, "    return None\n")]
    assert reward.grade(answers) == [1, 0] * (len(answers) // 2)
