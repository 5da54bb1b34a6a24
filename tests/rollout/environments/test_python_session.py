"""The tool python in an episode; tests/rewards/test_sandbox_session.py attacks the session itself."""

import asyncio
import os

import psutil
import pytest
from test_tools_environment import call, played, turn

from megatron_opd.rewards import sandbox
from megatron_opd.rewards.sandbox import SandboxLimits
from megatron_opd.rollout.environments import python_session


def python(*codes, **settings):
    """(content, failures) of each call, a turn each, in one episode."""
    replies = played(*(turn(call("python", code=code)) for code in codes), tools=["python"], **settings)
    return [(reply.messages[0]["content"], reply.failures) for reply in replies]


def test_names_live_on_from_turn_to_turn():
    found = python("x = 3", "print('hi')\nx * 2", "1 / 0", "x")
    assert found == [
        ("(no output)", {}),
        ("hi\n6", {}),
        ("ZeroDivisionError in line 1: division by zero", {"error": 1}),
        ("3", {}),
    ]


def test_a_session_that_is_played_again_says_the_same():
    codes = [
        "class Cat: pass\nCat(), Cat().__init__, abs",
        "def gen():\n    yield 1\nprint(gen, gen().__next__, gen.__code__)\nraise ValueError(gen())",
        "{'pear', 'fig', 'plum', 'kiwi', 'nut'}",
        "print('at 0x12 or 0xfe'); hex(254)",
    ]
    once, again = python(*codes), python(*codes)
    assert once == again
    assert once[0][0].startswith("(<__main__.Cat object at 0x...>, ")
    assert once[3][0] == "at 0x12 or 0xfe\n'0xfe'"


def test_a_session_that_dies_or_hangs_begins_anew_and_says_so(monkeypatch):
    monkeypatch.setattr(python_session, "CALL_S", 120.0)
    died, after = python("x = 3\nimport os\nos._exit(0)", "x")
    assert died[1] == {"died": 1}
    assert "took more than it may: 512 MB of memory, 64 MB of files. The session begins anew" in died[0]
    assert after == ("NameError in line 1: name 'x' is not defined", {"error": 1})
    monkeypatch.setattr(python_session, "CALL_S", 0.5)
    (hung,) = python("while True: pass")
    assert hung[1] == {"timeout": 1}
    assert "the code was ended after 0.5 seconds. The session begins anew" in hung[0]


def test_outputs_are_cut_to_the_settings_budget():
    (found,) = python("print('x' * 10**6)", output_tokens=50)
    assert len(found[0]) < 50 * python_session._CHARACTERS_A_TOKEN + 100


def jails():
    here = psutil.Process(os.getpid())
    return [p for p in here.children() if str(sandbox.JAIL) in p.cmdline()]


@pytest.mark.parametrize("number", [12])
def test_many_sessions_at_once_are_apart_and_all_are_closed(number):
    limits = SandboxLimits(timeout_s=120.0)

    async def one(at):
        session = python_session.PythonSession(limits, characters=400)
        await session.call({"code": f"x = {at}"}, 120.0)
        said = await session.call({"code": "x"}, 120.0)
        await session.close()
        await session.close()
        return said.text

    async def play():
        return await asyncio.gather(*(one(at) for at in range(number)))

    python_session.CALL_S, before = 120.0, python_session.CALL_S
    try:
        assert asyncio.run(play()) == [str(at) for at in range(number)]
    finally:
        python_session.CALL_S = before
    assert jails() == []


def test_a_call_that_is_cancelled_leaves_nothing_when_its_session_is_closed():
    async def play():
        session = python_session.PythonSession(SandboxLimits(timeout_s=120.0), characters=400)
        running = asyncio.ensure_future(session.call({"code": "while True: pass"}, 120.0))
        await asyncio.sleep(0.3)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await session.close()

    asyncio.run(play())
    assert jails() == []
