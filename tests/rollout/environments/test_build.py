"""Environments by name, and classes of one's own."""

import asyncio

import pytest

from megatron_opd.config.environment import EnvironmentConfig
from megatron_opd.core.environment import Turn
from megatron_opd.core.types import Prompt
from megatron_opd.rollout.environments.build import build_kind

PROMPT = Prompt(source="s", index=0, text="?", token_ids=(1,), extra={"start": 3})
TURN = Turn(number=0, text="", content="")


def test_none_says_nothing():
    kind = build_kind(EnvironmentConfig())
    assert (kind.name, kind.tools, kind.fields) == ("none", (), ())

    async def play():
        world = kind.make()
        await world.start(PROMPT)
        reply = await world.answer(TURN)
        await world.close()
        return reply

    reply = asyncio.run(play())
    assert (reply.messages, reply.is_done) == ((), False)


def test_a_class_of_ones_own():
    kind = build_kind(EnvironmentConfig(name="own_tools:Countdown", options={"by": 2}))
    assert (kind.fields, kind.tools, kind.note) == (("start",), (), "it counts")
    kind.check(PROMPT)
    with pytest.raises(ValueError, match='needs "start"'):
        kind.check(Prompt(source="s", index=0, text="?", token_ids=(1,)))

    async def play():
        world = kind.make()
        await world.start(PROMPT)
        return [await world.answer(TURN) for _ in range(2)]

    replies = asyncio.run(play())
    assert [reply.is_done for reply in replies] == [False, True]
    assert kind.make() is not kind.make()


def test_its_tools_may_depend_on_its_options():
    kind = build_kind(EnvironmentConfig(name="own_tools:WithTools", options={"by": 7}))
    assert kind.tools[0]["function"]["name"] == "by_7"


def test_whatever_its_check_raises_says_what_is_wrong_with_a_row():
    kind = build_kind(EnvironmentConfig(name="own_tools:OddCheck"))
    with pytest.raises(ValueError, match=r"environment 'own_tools:OddCheck': its check raised KeyError\('nowhere'\)"):
        kind.check(PROMPT)


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("nowhere:C", {}, "environment 'nowhere:C': nowhere cannot be imported: .*; it is looked for in"),
        ("own_tools:Nothing", {}, "own_tools has no class Nothing"),
        ("own_tools:", {}, "own_tools has no class"),
        ("own_tools:Bare", {}, "has no method answer"),
        ("own_tools:WithTools", {"other": 1}, "its tools cannot be listed: TypeError"),
        ("own_tools:Countdown", {"other": 1}, "environment.options do not fit: .*'other'"),
        ("own_tools:Blocking", {}, "its method answer must be async: write `async def answer`"),
        ("own_tools:ToolNames", {}, "its `tools` must be schemas, not 'calculator': write"),
    ],
)
def test_a_class_that_cannot_be_is_refused_before_the_run(name, options, why):
    with pytest.raises(ValueError, match=why):
        build_kind(EnvironmentConfig(name=name, options=options))
