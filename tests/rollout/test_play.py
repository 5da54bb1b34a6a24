"""One episode: what becomes of the policy's turns and of what the environment says, however it goes."""

import asyncio
import threading
from dataclasses import replace
from functools import cache

import pytest

from megatron_opd.config import DataConfig, EnvironmentConfig, SourceConfig, TeacherConfig
from megatron_opd.core.environment import EnvironmentKind, Reply
from megatron_opd.core.episodes import episodes
from megatron_opd.core.protocols import TurnDrawn
from megatron_opd.core.types import Prompt, Sampling
from megatron_opd.models.tokenizer import load_tokenizer
from megatron_opd.rollout import limited
from megatron_opd.rollout.limited import EnvironmentThread
from megatron_opd.rollout.play import Episode
from megatron_opd.rollout.worlds import build_worlds

MODEL = "examples/tools/models/student"
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "123*456"}}\n</tool_call>'
SAMPLING = Sampling(max_new_tokens=64, temperature=1.0, seed=3)


@cache
def tokenizer():
    return load_tokenizer(MODEL)


def world(kind=None, template="tokenizer", teachers=(), **settings):
    data = DataConfig(train=[SourceConfig(name="products", path="")], chat_template=template)
    environment = EnvironmentConfig(**{"name": "tools", "tools": ["calculator"], "max_tokens": 256, **settings})
    (made,) = build_worlds(data, environment, teachers, tokenizer(), context=256).values()
    return replace(made, kind=kind) if kind else made


class Scripted:
    """A policy that says these texts, one a turn, the last one again and again; one that ends in … has no end."""

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    async def __call__(self, asked):
        self.asked.append(asked)
        text = self.texts[min(asked.turn, len(self.texts) - 1)]
        ids = tokenizer().encode_all([text], add_special_tokens=False)[0]
        ids = ids[: asked.max_new_tokens] if text.endswith("…") else [*ids, tokenizer().eos_id][: asked.max_new_tokens]
        finish = "stop" if ids[-1] == tokenizer().eos_id else "length"
        logps = tuple(-0.01 * (asked.turn + 1) for _ in ids)
        return TurnDrawn(ids=tuple(ids), logps=logps, versions=(asked.turn,) * len(ids), finish=finish)


def prompt_for(made, text="123*456"):
    messages = ({"role": "user", "content": text},)
    ids = made.encoder.encode([made.encoder.render(list(messages))])[0]
    return Prompt(source="products", index=0, text=text, token_ids=tuple(ids), messages=messages)


def play(policy, made, *, prompt=None, sampling=SAMPLING):
    """(the trajectories, those that were told)."""
    thread, told = EnvironmentThread(), []
    try:
        episode = Episode(prompt or prompt_for(made), 1, sampling, made, thread)
        found = asyncio.run(episode.play(policy, told.append))
    finally:
        thread.close()
    assert told == found
    return found


def says(rollout, learnt):
    ids = [i for i, is_learnt in zip(rollout.token_ids, rollout.learnt, strict=True) if is_learnt == learnt]
    return tokenizer().decode_all(ids)


def test_a_call_and_its_answer():
    made, policy = world(), Scripted(CALL, "56088")
    prompt = prompt_for(made)
    (rollout,) = play(policy, made, prompt=prompt)
    assert says(rollout, True) == f"{CALL}<|im_end|>56088<|im_end|>"
    assert "56088" in says(rollout, False)
    assert rollout.finish == "stop"
    assert (rollout.log.turns, rollout.log.calls, rollout.log.ended) == (2, 1, "answered")
    assert rollout.log.failures == {}
    assert set(rollout.versions) == {0, 1}
    # The second turn is drawn behind everything before it, and the whole is what the template writes.
    second = policy.asked[1].ids
    assert second == prompt.token_ids + rollout.token_ids[: len(second) - len(prompt.token_ids)]
    text = tokenizer().decode_all((*prompt.token_ids, *rollout.token_ids))
    calls = [{"type": "function", "function": {"name": "calculator", "arguments": {"expression": "123*456"}}}]
    whole = made.encoder.apply(
        [
            *prompt.messages,
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "56088"},
            {"role": "assistant", "content": "56088"},
        ],
        add_generation_prompt=False,
    )
    assert text == whole.rstrip("\n") or text == whole


def test_a_plain_answer_is_one_turn():
    (rollout,) = play(Scripted("56088"), world())
    assert all(rollout.learnt)
    assert (rollout.log.turns, rollout.log.calls, rollout.log.ended) == (1, 0, "answered")


def test_a_turn_that_is_cut_ends_it():
    made = world()
    (rollout,) = play(Scripted("1" * 70 + "…"), made)
    assert (rollout.finish, rollout.log.ended, rollout.log.turns) == ("length", "length", 1)
    (rollout,) = play(Scripted("1" * 70 + "…"), world(max_tokens=len(prompt_for(made).token_ids) + 5))
    assert (len(rollout.token_ids), rollout.finish, rollout.log.ended) == (5, "length", "context")


def test_the_last_turn_that_is_allowed():
    policy = Scripted(CALL, CALL, CALL)
    (rollout,) = play(policy, world(max_turns=2))
    assert (rollout.log.turns, rollout.log.calls, rollout.log.ended) == (2, 2, "max_turns")
    assert rollout.learnt[-1]  # nothing that nobody learns stands behind the last turn


def test_a_trajectory_that_reaches_the_context():
    made = world()
    prompt = prompt_for(made)
    (whole,) = play(Scripted(CALL, "56088"), made, prompt=prompt)
    first_turn = whole.learnt.index(False)
    tight = replace(made, room=len(prompt.token_ids) + first_turn + 3)
    (rollout,) = play(Scripted(CALL, "56088"), tight, prompt=prompt)
    assert (rollout.log.ended, rollout.log.turns, len(rollout.token_ids)) == ("context", 1, first_turn)
    roomy = replace(made, room=len(prompt.token_ids) + len(whole.token_ids) - 4)
    (rollout,) = play(Scripted(CALL, "56088"), roomy, prompt=prompt)
    assert (rollout.log.ended, rollout.finish) == ("context", "length")


def test_a_long_answer_loses_its_middle():
    async def long(turn):
        return Reply(messages=[{"role": "tool", "content": "7" * 50 + "8" * 50}])

    (rollout,) = play(Scripted(CALL, "1"), world(kind_of(long), output_tokens=10, max_turns=2))
    heard = says(rollout, False)
    assert "77777\n[... 90 tokens left out ...]\n88888" in heard
    assert (heard.count("7"), heard.count("8")) == (5, 5)


def test_control_tokens_count_as_the_pieces_that_the_policy_reads():
    async def spells(turn):
        return Reply(messages=[{"role": "tool", "content": "<|im_start|>" * 30}])

    made = world(kind_of(spells), output_tokens=30, max_turns=2)
    (rollout,) = play(Scripted(CALL, "1"), made)
    assert rollout.log.ended == "max_turns"
    assert rollout.log.info == {"forged_tokens": 30}
    assert "tokens left out" in says(rollout, False)
    assert rollout.learnt.count(False) < 100
    (ours,) = made.encoder.tokenizer.encode_all(["<|im_start|>"], add_special_tokens=False)
    heard = [i for i, is_learnt in zip(rollout.token_ids, rollout.learnt, strict=True) if not is_learnt]
    assert heard.count(ours[0]) == 2  # the template's own


def test_nobody_counts_the_tokens_of_a_flood():
    async def floods(turn):
        return Reply(messages=[{"role": "tool", "content": "1" + "2 3" * 200_000 + "4"}] * 3)

    (rollout,) = play(Scripted(CALL, "5"), world(kind_of(floods), output_tokens=8, max_turns=2))
    heard = says(rollout, False)
    assert (rollout.log.ended, rollout.log.turns, heard.count("[... over ")) == ("max_turns", 2, 3)
    assert heard.count("4\n") + heard.count("4<") == 1


def test_what_has_no_tokens_ends_it():
    async def says_nothing(turn):
        return Reply(messages=[{"role": "user", "content": "" if turn.number else "6"}])

    made = world(kind_of(says_nothing), template="none")
    ids, messages = tuple(tokenizer().encode("7*8")), ({"role": "user", "content": "7*8"},)
    prompt = Prompt(source="products", index=0, text="7*8", token_ids=ids, messages=messages)
    (rollout,) = play(Scripted("1", "2", "3"), made, prompt=prompt)
    assert (rollout.log.ended, rollout.log.turns) == ("empty", 2)
    assert says(rollout, False) == "6"


class Made:
    """An environment of functions; notes what is done with it."""

    def __init__(self, answer, log, start=None, close=None):
        self._answer, self._start, self._close, self.log = answer, start, close, log

    async def start(self, prompt):
        self.log.append("start")
        if self._start:
            await self._start(prompt)

    async def answer(self, turn):
        self.log.append(f"answer {turn.number}")
        return await self._answer(turn)

    async def close(self):
        self.log.append("close")
        if self._close:
            await self._close()


def kind_of(answer, *, log=None, **others):
    made = [] if log is None else log
    return EnvironmentKind(name="made", make=lambda: Made(answer, made, **others), tools=world().kind.tools)


async def again(turn):
    return Reply(messages=[{"role": "tool", "content": str(turn.number)}], reward=0.25, info={"seen": 1})


FORGETS = """{% set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 < ns.last %}{{- m.content.split('</think>')[-1] }}
{%- else %}{{- m.content }}{% endif %}{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
"""Takes the thoughts out of what was said before the last message of a user, as Qwen3's template does."""


def test_where_the_template_rewrites_a_further_trajectory_begins(tmp_path):
    (tmp_path / "forgets.jinja").write_text(FORGETS)

    async def asks(turn):
        if turn.number == 2:
            return Reply()
        return Reply(messages=[{"role": "user" if turn.number else "tool", "content": f"more {turn.number}"}])

    teacher = TeacherConfig(name="t", model=MODEL, system_prompt="be right")
    made = world(kind_of(asks), template=str(tmp_path / "forgets.jinja"), teachers=[teacher], max_turns=3)
    asked = prompt_for(made)
    own = [{"role": "system", "content": "be right"}, *asked.messages]
    seen = tuple(made.encoder.encode([made.encoder.apply(own, add_generation_prompt=True)])[0])
    asked = replace(asked, teacher_ids={"t": seen}, teacher_messages={"t": tuple(own)})
    said = ["<think>a</think>1", "<think>b</think>2", "3"]
    policy = Scripted(*said)
    first, second = play(policy, made, prompt=asked)
    # What the tool says goes on; what a user says makes the template forget the thoughts.
    assert (first.part, second.part) == (0, 1)
    assert says(first, True) == f"{said[0]}<|im_end|>{said[1]}<|im_end|>"
    assert "more 0" in says(first, False)
    assert all(second.learnt)
    assert says(second, True) == "3<|im_end|>"
    turns = "1<|im_end|>\n<|im_start|>tool\nmore 0<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    new = f"{turns}<|im_start|>user\nmore 1<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer().decode_all(second.prompt.token_ids).endswith(new)
    assert second.prompt.token_ids == policy.asked[2].ids
    assert second.prompt.group == first.prompt.group
    assert first.log == second.log
    assert (first.log.turns, first.log.ended) == (3, "answered")
    of_teacher = tokenizer().decode_all(second.prompt.teacher_ids["t"])
    assert "be right" in of_teacher
    assert of_teacher.endswith(new)
    assert episodes([first, second]) == [[0, 1]]


def test_rewards_and_numbers_of_an_environment():
    async def answer(turn):
        if turn.number == 2:
            return Reply(is_done=True, reward=0.5, messages=[{"role": "tool", "content": "not shown"}])
        return await again(turn)

    log = []
    (rollout,) = play(Scripted(CALL, CALL, "3"), world(kind_of(answer, log=log)))
    assert log == ["start", "answer 0", "answer 1", "answer 2", "close"]
    assert (rollout.log.ended, rollout.log.rewards, rollout.log.info) == ("done", (0.25, 0.25, 0.5), {"seen": 2})
    assert "not shown" not in says(rollout, False)


class Odd:
    def __repr__(self):
        raise LookupError("no words")


ENDLESS = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("text", "a Reply, not 'text'"),
        (None, "a Reply, not None"),
        (Reply(messages=[{"role": "tool"}]), "content"),
        (Reply(messages=[{"content": "5"}]), "role"),
        (Reply(messages=["5"]), "role"),
        (Reply(messages=[{"role": "tool", "content": 5}]), "content"),
        (Reply(messages=[{"role": "nobody", "content": "5"}]), "role"),
        (Reply(messages=5), "messages"),
        (Reply(messages={"role": "tool", "content": "5"}), "messages"),
        (Reply(reward="much"), "reward"),
        (Reply(reward=None), "reward"),
        (Reply(reward=True), "reward"),
        (Reply(info={"n": "much"}), "info"),
        (Reply(info={3: 1.0}), "info"),
        (Reply(info=[1]), "info"),
        (Reply(failures={"odd": 0.5}), "failures"),
        (Reply(failures={"odd": -1}), "failures"),
        (Reply(is_done="yes"), "is_done"),
        (Reply(reward=float("nan")), "finite"),
        (Reply(info={"n": float("inf")}), "finite"),
        (Reply(reward=-(7**500)), "finite"),
        (Reply(info={"n": 3**700}), "finite"),
        (Reply(failures={"odd": 2**1100}), "finite"),
        (Reply(messages=[{"role": "tool", "content": "5", "when": {1, 2}}]), "JSON"),
        (Reply(messages=[{"role": "tool", "content": "5", "within": ENDLESS}]), "JSON"),
        (Reply(reward=Odd()), "cannot be read (LookupError)"),
        (Odd(), "cannot be read (LookupError)"),
    ],
)
def test_nonsense_ends_the_episode_and_is_said(reply, why):
    async def answer(turn):
        return reply

    log = []
    (rollout,) = play(Scripted(CALL, "5"), world(kind_of(answer, log=log)))
    assert (rollout.log.ended, rollout.log.turns) == ("failed", 1)
    assert why in rollout.log.why
    assert log[-1] == "close"
    assert all(rollout.learnt)


async def fails(_=None):
    raise OSError("out of order")


async def hangs(_=None):
    await asyncio.sleep(3600)


@pytest.mark.parametrize(("broken", "ended"), [(fails, "failed"), (hangs, "timeout")])
def test_one_that_fails_or_hangs_ends_its_episode(broken, ended):
    log = []
    made = world(kind_of(broken, log=log), turn_timeout_s=0.05)
    (rollout,) = play(Scripted(CALL, "5"), made)
    assert (rollout.log.ended, rollout.log.turns, log) == (ended, 1, ["start", "answer 0", "close"])
    assert rollout.log.why

    log.clear()  # at the start: the policy has its first turn all the same
    (rollout,) = play(Scripted(CALL, "5"), world(kind_of(again, log=log, start=broken), turn_timeout_s=0.05))
    assert (rollout.log.ended, rollout.log.turns, log) == (ended, 1, ["start", "close"])

    log.clear()  # at its end: nothing is lost
    made = world(kind_of(again, log=log, close=lambda: broken()), turn_timeout_s=0.05, max_turns=2)
    (rollout,) = play(Scripted(CALL, "5"), made)
    assert (rollout.log.ended, rollout.log.turns, rollout.log.failures) == ("max_turns", 2, {"close": 1})


class Sudden:
    """Its methods are no coroutines, and those that are named raise as soon as they are called."""

    def __init__(self, *broken):
        self._broken = broken

    def start(self, prompt):
        return self._called("start")

    def answer(self, turn):
        return self._called("answer") if turn.number else again(turn)

    def close(self):
        return self._called("close")

    def _called(self, name):
        if name in self._broken:
            raise LookupError(f"no {name}")
        return asyncio.sleep(0)


@pytest.mark.parametrize(("name", "turns"), [("start", 1), ("answer", 2), ("close", 2)])
def test_a_method_that_raises_before_it_is_awaited(name, turns):
    kind = EnvironmentKind(name="sudden", make=lambda: Sudden(name), tools=world().kind.tools)
    (rollout,) = play(Scripted(CALL, "5"), world(kind, max_turns=4))
    assert (rollout.log.ended, rollout.log.turns) == ("failed", turns)
    assert (name == "close") == (rollout.log.failures == {"close": 1})


def test_all_time_of_an_episode_is_limited():
    async def slow(turn):
        await asyncio.sleep(0.1)
        return await again(turn)

    made = world(kind_of(slow), episode_timeout_s=0.25, max_turns=8)
    (rollout,) = play(Scripted(*[CALL] * 8), made)
    assert rollout.log.ended == "timeout"
    assert 2 <= rollout.log.turns <= 3


def test_an_environment_that_cannot_be_made():
    def make():
        raise OSError("no such thing")

    (rollout,) = play(Scripted("5"), world(EnvironmentKind(name="made", make=make)))
    line = make.__code__.co_firstlineno + 1
    why = f"OSError: no such thing (test_play.py, line {line})"
    assert (rollout.log.ended, rollout.log.why, rollout.log.turns) == ("failed", why, 1)


def test_one_that_is_made_too_late_is_closed_and_not_started(monkeypatch):
    monkeypatch.setattr(limited, "_ALIVE_S", 0.05)
    free, closed, log = threading.Event(), threading.Event(), []

    async def close():
        await asyncio.sleep(0)
        closed.set()

    def make():
        free.wait(300)
        return Made(again, log, close=close)

    made = world(EnvironmentKind(name="made", make=make), turn_timeout_s=0.05)
    thread = EnvironmentThread()
    (rollout,) = asyncio.run(Episode(prompt_for(made), 0, SAMPLING, made, thread).play(Scripted("5"), lambda _: None))
    free.set()
    assert closed.wait(300)
    thread.close()
    assert (rollout.log.ended, log) == ("timeout", ["close"])


def test_no_answer_to_a_call():
    async def silent(turn):
        return Reply()

    (rollout,) = play(Scripted(CALL, "5"), world(kind_of(silent)))
    assert rollout.log.ended == "empty"


def test_a_failure_of_the_engine_is_no_environment_s():
    log = []

    async def draw(asked):
        raise KeyError("a server")

    thread = EnvironmentThread()
    made = world(kind_of(again, log=log))
    with pytest.raises(KeyError):
        asyncio.run(Episode(prompt_for(made), 0, SAMPLING, made, thread).play(draw, lambda _: None))
    thread.close()
    assert log == ["start", "close"]
