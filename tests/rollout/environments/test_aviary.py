"""Environments of aviary: one that comes with it, one made of functions, and a data set of tasks.

pip install --target SOME_FOLDER 'fhaviary>=0.37,<0.38', and the folder on PYTHONPATH, runs these without installing it.
"""

import asyncio
import json
import sys
from importlib.util import find_spec

import pytest

from megatron_opd.config.environment import EnvironmentConfig
from megatron_opd.core.environment import Call, Turn
from megatron_opd.core.types import Prompt
from megatron_opd.rollout.environments.build import build_kind

NAME = "megatron_opd.rollout.environments.aviary:Aviary"
WHY = "" if find_spec("aviary") else "environments of aviary need the package fhaviary"
needs_it = pytest.mark.skipif(bool(WHY), reason=WHY)
QUIZ = {"dataset": "own_aviary:Quiz", "size": 3}


def kind_of(**options):
    return build_kind(EnvironmentConfig(name=NAME, options=options))


def prompt(task):
    return Prompt(source="s", index=0, text="?", token_ids=(1,), extra={"task": task})


def call(name, id="a", **arguments):
    return Call(name=name, arguments=arguments, id=id)


def played(kind, task, *turns):
    """The replies to turns of calls."""

    async def play():
        world = kind.make()
        await world.start(prompt(task))
        told = [Turn(number=at, text="text", content="text", calls=calls) for at, calls in enumerate(turns)]
        replies = [await world.answer(one) for one in told]
        await world.close()
        return replies

    return asyncio.run(play())


@needs_it
def test_the_one_that_comes_with_it():
    kind = kind_of(environment="dummy")
    assert [tool["function"]["name"] for tool in kind.tools] == [
        "print_story",
        "cast_float",
        "cast_int",
        "get_random_int",
    ]
    assert kind.tools[0]["function"]["parameters"]["required"] == ["story"]
    assert kind.fields == ("task",)
    kind.check(prompt("about cats"))
    silent, cast, story = played(
        kind, "about cats", (), (call("cast_float", x="2.5"),), (call("print_story", "b", story="a b c d e"),)
    )
    assert silent.messages[0]["role"] == "user"
    assert "No tool calls" in silent.messages[0]["content"]
    assert not silent.is_done
    assert cast.messages == [{"role": "tool", "name": "cast_float", "tool_call_id": "a", "content": "2.5"}]
    assert (story.is_done, story.reward) == (True, 1.0)


@needs_it
def test_a_data_set_of_tasks():
    kind = kind_of(**QUIZ)
    wrong, right = played(kind, 2, (call("guess", number=5),), (call("guess", number=2),))
    assert (wrong.is_done, wrong.reward, wrong.messages[0]["content"]) == (False, 0.0, "no")
    assert (right.is_done, right.reward) == (True, 1.0)


@needs_it
def test_bad_calls_are_told_and_counted_as_those_of_tools_are():
    bad = (
        call("guess", "a", number="two"),
        Call(name="", problem="no JSON", id="b"),
        call("guess", "c", number=0),
        call("other", "d"),
    )
    mixed, none_good, raised = played(kind_of(**QUIZ), 1, bad, bad[:2], (call("guess", number=-1),))
    assert [message["tool_call_id"] for message in mixed.messages] == ["a", "b", "c", "d"]
    assert mixed.failures == {"bad_arguments": 1, "not_json": 1, "unknown_tool": 1}
    assert mixed.messages[2]["content"] == "no"
    assert none_good.failures == {"bad_arguments": 1, "not_json": 1}
    assert raised.failures == {"error": 1}
    assert raised.messages[0]["content"] == "Error: ValueError: below nothing"
    assert not raised.is_done


@needs_it
def test_tools_that_differ_from_those_shown_end_the_episode():
    kind = kind_of(**QUIZ, odd=True)
    with pytest.raises(ValueError, match="task 1 has other tools"):
        played(kind, 1)


@needs_it
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "must name either a dataset or an environment"),
        ({"dataset": "nothing"}, "aviary knows no 'nothing', but dummy"),
        ({"environment": "dummy", "more": 1}, "takes no option 'more'"),
        ({"dataset": "own_aviary:Quiz", "sides": 6}, "sides"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(options, why):
    with pytest.raises(ValueError, match=why):
        kind_of(**options)


@needs_it
def test_rows_of_prompts(tmp_path):
    import aviary_prompts

    file, tasks = tmp_path / "rows.jsonl", tmp_path / "tasks.txt"
    quiz = ["--dataset", "own_aviary:Quiz", "--options", "size=3", "--first", "1", "--count", "2"]
    assert aviary_prompts.main([str(file), *quiz]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [{"prompt": [{"role": "user", "content": f"Guess {n}."}], "task": n} for n in (1, 2)]
    tasks.write_text("cats\ndogs\n")
    assert aviary_prompts.main([str(file), "--environment", "dummy", "--tasks", str(tasks)]) == 0
    assert [json.loads(line)["task"] for line in file.read_text().splitlines()] == ["cats", "dogs"]
    assert aviary_prompts.main([str(file), "--environment", "dummy"]) == 1


@needs_it
def test_the_environment_of_gsm8k():
    pytest.importorskip("aviary.envs.gsm8k.env", reason="needs the package aviary.gsm8k")
    kind = kind_of(environment="calculator")
    assert [tool["function"]["name"] for tool in kind.tools] == ["calculator", "submit_answer"]
    computed, ended = played(
        kind, "What is 6 times 7?", (call("calculator", expr="6*7"),), (call("submit_answer", answer="0"),)
    )
    assert computed.messages[0]["content"] == "42"
    assert (ended.is_done, ended.reward) == (True, 1.0)


@pytest.mark.skipif(not WHY, reason="the package fhaviary is here")
def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "aviary.env", None)
    with pytest.raises(ValueError, match=r"pip install 'megatron-opd\[aviary\]'"):
        kind_of(environment="dummy")


@pytest.mark.parametrize("task", [None, True, 1.5, ["a"]])
def test_a_row_needs_a_task(task):
    from megatron_opd.rollout.environments.aviary import Aviary

    with pytest.raises(ValueError, match='needs a field "task"'):
        Aviary.check(prompt(task))
