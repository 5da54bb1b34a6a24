"""What a step learns from: where its prompts end, which of them are this replica's, and which teachers are told."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny

from megatron_opd.config import ServersConfig, SourceConfig
from megatron_opd.core.types import Prompt
from megatron_opd.prompts.mix import PromptMix
from megatron_opd.sglang import nccl
from megatron_opd.trainer import loop
from megatron_opd.trainer.experience import Experience

TEACHERS = [
    {"name": "x", "model": "x", "weight": 1.0, "sources": {"b": 0.0}},
    {"name": "y", "model": "y", "weight": 0.0, "sources": {"b": 2.0}},
]


def parallel(**place):
    here = {"is_leader": False, "data_rank": 0, "data_size": 1, "pipeline_size": 1, "length_multiple": 1}
    return SimpleNamespace(**{**here, "share": lambda compute: compute(), **place})


def experience(teachers=(), *, place=None, **sections):
    """On a rank that samples nothing, unless `place` says something else."""
    settings = tiny.config("unused", TEACHERS, **sections)
    return Experience(settings, place or parallel(), teachers, None)


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 7])
def test_the_place_in_the_prompts_is_behind_what_was_taken_not_what_is_drawn_ahead(max_staleness):
    prompts = [Prompt(source="a", index=i, text="", token_ids=(i,)) for i in range(5)]
    mix = PromptMix([(SourceConfig(name="a", path=""), prompts)], seed=1)
    ours = experience(rollout={"prompts_per_step": 3, "max_staleness": max_staleness}, train={"steps": 4})
    ours.start(mix)
    for step in range(4):
        ours.sample(step)
        assert ours.cursor == {"a": 3 * (step + 1)}
    ours.close()


@pytest.mark.parametrize(("source", "told"), [("a", ["x"]), ("b", ["y"])])
def test_only_teachers_with_a_weight_for_the_source_are_told_about_an_answer(source, told):
    asked = {name: [] for name in "xy"}
    teachers = [SimpleNamespace(submit=asked[name].append) for name in "xy"]
    rollout = tiny.rollout((1, 2), (3,), source=source)
    experience(teachers)._submit(rollout)
    assert asked == {name: [rollout] if name in told else [] for name in "xy"}


def test_nobody_is_told_about_an_answer_that_is_not_distilled():
    asked = []
    teachers = [SimpleNamespace(submit=asked.append)] * 2
    ours = experience(teachers, answers={"lmbda": 0.5, "sft_alpha": 1.0, "distill_alpha": 0.0})
    ours._submit(replace(tiny.rollout((1,), (2,)), origin="dataset"))
    assert asked == []
    ours._submit(tiny.rollout((1,), (2,)))
    assert len(asked) == 1


def test_every_step_draws_other_numbers_and_the_same_ones_when_it_is_repeated():
    seeds = []

    def to(prompts, how, step, on_finished):
        seeds.append((how.seed, how.samples_per_prompt, how.temperature))
        return []

    ours = experience(rollout={"samples_per_prompt": 3, "temperature": 0.7})
    ours.leader = SimpleNamespace(answers=SimpleNamespace(to=to), grader=None)
    for step in (0, 1, 2, 1):
        ours.answers_to(step, [])
    assert len(set(seeds)) == 3
    assert seeds[1] == seeds[3]
    assert {how[1:] for how in seeds} == {(3, 0.7)}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_replicas_share_the_prompts(size):
    prompts = [*range(16)]
    shares = [experience(place=parallel(data_rank=rank, data_size=size)).mine(prompts) for rank in range(size)]
    assert sorted(x for share in shares for x in share) == sorted(prompts)
    assert {len(share) for share in shares} == {16 // size}


@pytest.mark.parametrize(("sync", "value"), [("broadcast", "0"), ("disk", None)])
def test_ranks_that_join_servers_have_nccls_switches_as_those_do(monkeypatch, sync, value):
    """Before their own first group: NCCL reads them once."""

    class Joining(Exception):
        pass

    def start(*_, **__):
        raise Joining({name: os.environ.get(name) for name in nccl.SWITCHES})

    for name in nccl.SWITCHES:
        monkeypatch.setenv(name, "x")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(loop.groups, "start", start)
    monkeypatch.setattr(loop.serve.torch.cuda, "is_available", lambda: True)
    servers = ServersConfig(urls=["http://127.0.0.1:1"])
    served = {"engine": "sglang", "sync": sync, "servers": servers}
    with pytest.raises(Joining) as caught:
        loop.train(tiny.config("unused", TEACHERS, rollout=served), lambda: None)
    assert caught.value.args[0] == dict.fromkeys(nccl.SWITCHES, value)


@pytest.mark.parametrize(
    ("engine", "data_rank", "gathers"), [("local", 1, True), ("sglang", 0, True), ("sglang", 1, False)]
)
def test_only_replicas_whose_weights_are_sent_gather_them(engine, data_rank, gathers):
    """The others' engines learn the version: their servers are the same."""
    loaded = []

    class Student:
        def export(self):
            yield "w", data_rank

    leader = SimpleNamespace(
        engine=SimpleNamespace(load=lambda weights, version: loaded.append((list(weights), version)))
    )
    place = parallel(is_leader=True, data_rank=data_rank, data_size=2, gather_world=lambda value: [value])
    here = Experience(tiny.config("unused", TEACHERS, rollout={"engine": engine}), place, [], leader)
    here.sync(Student(), 3)
    assert loaded == [([("w", data_rank)] if gathers else [], 3)]
