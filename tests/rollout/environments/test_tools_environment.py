"""The environment tools: one message a call, and one outcome for each thing that can be wrong with one."""

import asyncio

import own_tools
import pytest

from megatron_opd.config.environment import EnvironmentConfig
from megatron_opd.core.environment import Call, Turn
from megatron_opd.core.types import Prompt
from megatron_opd.rollout.environments.build import build_kind

PROMPT = Prompt(source="s", index=0, text="?", token_ids=(1,))


def turn(*calls, number=0):
    return Turn(number=number, text="", content="", calls=calls)


def call(name, id="abcdefgh1", **arguments):
    return Call(name=name, arguments=arguments, id=id)


def played(*turns, tools=("calculator",), **settings):
    """The replies to turns of one episode."""
    kind = build_kind(EnvironmentConfig(name="tools", tools=list(tools), **settings))

    async def play():
        world = kind.make()
        try:
            await world.start(PROMPT)
            return [await world.answer(one) for one in turns]
        finally:
            await world.close()

    return asyncio.run(play())


def test_every_call_has_a_message_in_order():
    (reply,) = played(turn(call("calculator", "a", expression="6*7"), call("calculator", "b", expression="1+1")))
    assert [dict(message) for message in reply.messages] == [
        {"role": "tool", "name": "calculator", "tool_call_id": "a", "content": "42"},
        {"role": "tool", "name": "calculator", "tool_call_id": "b", "content": "2"},
    ]
    assert (reply.is_done, reply.failures, reply.reward) == (False, {}, 0.0)


def test_a_turn_without_calls_is_the_answer():
    assert played(turn())[0].messages == []


LONG = "n" * 10**6


@pytest.mark.parametrize(
    ("wrong", "reason", "words"),
    [
        (Call(name="", problem="it is no JSON"), "not_json", "the call cannot be read: it is no JSON"),
        (call("abacus"), "unknown_tool", "there is no tool 'abacus'; there are: calculator"),
        (call(LONG), "unknown_tool", "there is no tool 'nnn"),
        (call("calculator"), "bad_arguments", "the argument 'expression' is missing"),
        (call("calculator", expression=3), "bad_arguments", "the argument 'expression' must be of type string"),
        (call("calculator", expression=None), "bad_arguments", "the argument 'expression' must be of type string"),
        (call("calculator", expression="1", x=2), "bad_arguments", "there is no argument 'x'; there are: expression"),
        (call("calculator", expression="1", **{LONG: 1}), "bad_arguments", "there is no argument 'nnn"),
        (call("calculator", expression="1/0"), "error", "division by zero"),
        (call("calculator", expression=LONG), "error", "longer than 1000 characters"),
    ],
)
def test_a_bad_call_is_told_and_counted_and_the_others_run(wrong, reason, words):
    (reply,) = played(turn(wrong, call("calculator", expression="2*3")))
    assert words in reply.messages[0]["content"]
    assert len(reply.messages[0]["content"]) < 300
    assert reply.messages[1]["content"] == "6"
    assert reply.failures == {reason: 1}


def test_a_turns_calls_share_its_time():
    hanging = [call("hang", str(at)) for at in range(3)]
    (reply,) = played(turn(*hanging), tools=["own_tools:hang"], turn_timeout_s=0.5)
    own_tools.LET_GO.set()
    assert reply.failures == {"timeout": 3}
    assert "the tool was given up after" in reply.messages[0]["content"]
    assert "have used up the turn's time" in reply.messages[2]["content"]


def test_tools_that_cannot_be():
    def refusal(*tools, name="tools"):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            build_kind(EnvironmentConfig(name=name, tools=list(tools)))
        return str(error.value)

    assert "environment.tools names none" in refusal()
    assert "there is no tool 'abacus'; known: calculator, python, or a function" in refusal("abacus")
    assert "more than one tool of the name calculator" in refusal("calculator", "calculator")
    assert "nowhere cannot be imported" in refusal("nowhere:f")
    assert "own_tools has no function other" in refusal("own_tools:other")
    assert "Write a type hint for each argument" in refusal("own_tools:undescribed")
    assert "there is no environment 'gym'; known: none, tools" in refusal(name="gym")
    assert "there is no environment 'run'" in refusal(name="run")
