"""Episodes of several turns, drawn in rounds: what is drawn together follows from the turns, never from time."""

import asyncio

import pytest

from megatron_opd.core.protocols import TurnAsked, TurnDrawn
from megatron_opd.core.types import Prompt
from megatron_opd.rollout.rounds import play_rounds

PROMPT = Prompt(source="a", index=0, text="", token_ids=(1,))


def asked(sample, turn):
    return TurnAsked(prompt=PROMPT, sample=sample, turn=turn, ids=(1,), max_new_tokens=4)


def talk(sample, turns, *, waits=()):
    """An episode whose environment takes so long after each turn."""

    async def play(draw):
        said = []
        for turn in range(turns):
            said.append(await draw(asked(sample, turn)))
            await asyncio.sleep(waits[turn] if turn < len(waits) else 0)
        return said

    return play


class Drawer:
    """Notes what is drawn together; a turn's token is its sample times ten and its number."""

    def __init__(self):
        self.rounds = []

    def __call__(self, turns, told):
        self.rounds.append([(one.sample, one.turn) for one in turns])
        for i in reversed(range(len(turns))):  # they end in any order
            ids = (turns[i].sample * 10 + turns[i].turn,)
            told(i, TurnDrawn(ids=ids, logps=(0.0,), versions=(0,), finish="stop"))


@pytest.mark.parametrize("waits", [(), (0.05, 0.0), (0.0, 0.05)])
def test_rounds_do_not_depend_on_how_long_an_environment_takes(waits):
    draw = Drawer()
    found = play_rounds([talk(0, 1), talk(1, 3, waits=waits), talk(2, 2)], draw)
    assert draw.rounds == [[(0, 0), (1, 0), (2, 0)], [(1, 1), (2, 1)], [(1, 2)]]
    assert [[drawn.ids[0] for drawn in its] for its in found] == [[0], [10, 11, 12], [20, 21]]


def test_an_environment_works_while_others_are_drawn():
    done = []

    async def first(draw):
        await draw(asked(0, 0))
        done.append("environment")
        return []

    async def second(draw):
        await draw(asked(1, 0))
        return []

    class Slow(Drawer):
        def __call__(self, turns, told):
            told(0, TurnDrawn(ids=(1,), logps=(0.0,), versions=(0,), finish="stop"))
            for _ in range(6000):  # until the environment of the first has worked, beside this
                if done:
                    break
                import time

                time.sleep(0.01)
            done.append("drawn")
            told(1, TurnDrawn(ids=(1,), logps=(0.0,), versions=(0,), finish="stop"))

    play_rounds([first, second], Slow())
    assert done == ["environment", "drawn"]


def test_no_episodes_at_all():
    draw = Drawer()
    assert play_rounds([], draw) == []
    assert draw.rounds == []


def test_a_failure_of_an_episode_ends_all_of_them():
    closed = []

    async def fails(draw):
        await draw(asked(0, 0))
        raise KeyError("a fault of ours")

    async def goes_on(draw):
        try:
            await asyncio.sleep(3600)
        finally:
            closed.append(1)

    async def draws(draw):
        await draw(asked(1, 0))
        await draw(asked(1, 1))
        return []

    with pytest.raises(KeyError, match="a fault of ours"):
        play_rounds([fails, draws], Drawer())
    with pytest.raises(RuntimeError, match="no tokens"):
        play_rounds([draws, draws], lambda turns, told: (_ for _ in ()).throw(RuntimeError("no tokens")))

    async def breaks(draw):
        raise KeyError("at once")

    with pytest.raises(KeyError, match="at once"):
        play_rounds([goes_on, breaks], Drawer())
    assert closed == [1]
