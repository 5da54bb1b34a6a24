"""Episodes of several turns over stand-ins: who draws their turns, and that none waits for another."""

import asyncio
from collections import defaultdict

import numpy as np
import pytest
from standin_model import END, VOCAB_SIZE, logps

from megatron_opd.core.protocols import TurnAsked
from megatron_opd.core.types import Prompt, Sampling
from megatron_opd.rollout.served_engine import SGLangEngine
from megatron_opd.sglang.errors import Down

PROMPTS = [Prompt(source="a", index=i, text="", token_ids=(3, 4, 5, 6 + i)) for i in range(6)]
SAMPLING = Sampling(max_new_tokens=6, temperature=1.0, samples_per_prompt=2, seed=7)
HEARD = (11, 12)
"""What the environment says, each time."""


@pytest.fixture
def make_engine(loop, make_pool):
    def make(servers, *, partial=False, **changes):
        pool = make_pool(servers, **changes)
        return SGLangEngine(pool, loop, None, eos_ids=(END,), vocab_size=VOCAB_SIZE, partial=partial)

    return make


def talk(prompt, sample, turns=3, wait=None):
    """An episode; returns what was read and what was drawn, by turn."""

    async def play(draw):
        ids, said = prompt.token_ids, []
        for turn in range(turns):
            asked = TurnAsked(prompt=prompt, sample=sample, turn=turn, ids=ids, max_new_tokens=6 - turn)
            drawn = await draw(asked)
            said.append((ids, drawn))
            ids = ids + drawn.ids + HEARD
            if wait is not None:
                await wait(turn)
        return said

    return play


def talks(**settings):
    return [talk(prompt, sample, **settings) for prompt in PROMPTS for sample in range(2)]


def test_every_turn_is_drawn_behind_all_tokens_before(servers, make_engine):
    found = make_engine(servers(2)).converse(talks(), SAMPLING)
    for said in found:
        for turn, (ids, drawn) in enumerate(said):
            assert len(drawn.ids) == 6 - turn or drawn.finish == "stop"
            rows = [logps(ids + drawn.ids[:r], temperature=1.0) for r in range(len(drawn.ids))]
            wanted = [row[i] for row, i in zip(rows, drawn.ids, strict=True)]
            np.testing.assert_allclose(drawn.logps, wanted, atol=1e-6)
            assert drawn.versions == (0,) * len(drawn.ids)
    first, *others = [[drawn.ids for _, drawn in said] for said in found]
    assert first not in others
    assert found == make_engine(servers(1)).converse(talks(), SAMPLING)  # which server does not matter
    assert make_engine(servers(1)).converse([], SAMPLING) == []


def test_the_first_turn_is_the_plain_answer(servers, make_engine):
    engine = make_engine(servers(1))
    plain = [rollout.token_ids for rollout in engine.generate(PROMPTS, SAMPLING)]
    assert [said[0][1].ids for said in engine.converse(talks(turns=1), SAMPLING)] == plain


def test_the_turns_of_a_prompt_s_episodes_go_to_one_server(servers, make_engine):
    both = servers(2)
    make_engine(both).converse(talks(), SAMPLING)
    where = defaultdict(set)
    for server in both:
        for body in server.seen:
            where[body["input_ids"][3]].add(server.url)
    assert len(where) == len(PROMPTS)
    assert all(len(urls) == 1 for urls in where.values())
    assert len(set.union(*where.values())) == 2


def test_no_episode_waits_for_another_one(servers, make_engine):
    others_are_done, done = asyncio.Event(), []

    async def waits(turn):
        await asyncio.wait_for(others_are_done.wait(), 120)

    def counted(one):
        async def play(draw):
            said = await one(draw)
            done.append(1)
            if len(done) == len(quick):
                others_are_done.set()
            return said

        return play

    quick = [counted(one) for one in talks()[1:]]
    slow = talk(PROMPTS[0], 0, wait=waits)
    assert make_engine(servers(1)).converse([slow, *quick], SAMPLING) == make_engine(servers(1)).converse(
        talks(), SAMPLING
    )


@pytest.mark.parametrize("partial", [False, True])
def test_an_episode_goes_on_elsewhere_and_after_aborts(servers, make_engine, partial):
    wanted = make_engine(servers(1)).converse(talks(), SAMPLING)
    first, second = servers(2)
    second.abort_after = 2
    engine, killed = make_engine([first, second], partial=partial), []

    async def kills(turn):
        if not killed:
            killed.append(first.url)
            await asyncio.get_running_loop().run_in_executor(None, first.kill)
            second.abort_after = None

    found = engine.converse([talk(PROMPTS[0], 0, wait=kills), *talks()[1:]], SAMPLING)
    assert found == wanted
    assert killed


def test_without_any_server_left_all_of_it_fails(servers, make_engine):
    (server,) = servers(1)
    engine = make_engine([server], retries=1)

    async def kills(turn):
        await asyncio.get_running_loop().run_in_executor(None, server.kill)

    with pytest.raises(Down):
        engine.converse([talk(PROMPTS[0], 0, wait=kills)], SAMPLING)
