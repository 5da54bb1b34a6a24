"""Tables of answers: what a line says, who writes, when, and what a resume drops."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import tiny
import torch

from megatron_opd import config as c
from megatron_opd.config import LogConfig
from megatron_opd.core.batching import pack
from megatron_opd.core.scores import Sampled
from megatron_opd.core.types import EpisodeLog
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.distillation import Distillation
from megatron_opd.tracking import token_file
from megatron_opd.tracking.tracker import Tracker, build_tracker
from megatron_opd.trainer import token_tables
from megatron_opd.trainer.completions import Completions

TOKENIZER = SimpleNamespace(decode=lambda ids: "".join(chr(96 + i) for i in ids))


NO_TEACHER = (), Distillation(c.LossConfig(), 1.0, VocabShard.whole(9), (), ())


def parallel(replicas=1, is_main=True):
    """Of replicas whose answers are all the same."""
    place = {"is_main": is_main, "is_last_stage": True, "data_rank": 0, "is_leader": True, "counts_whole": True}
    return SimpleNamespace(
        **place, gather_leaders=lambda value: [value] * replicas, gather_world=lambda value: [value] * replicas
    )


def told_by_two():
    """The answers as a micro-batch, and who reads it: one teacher was asked about both, another about the first."""
    teachers = tuple(c.TeacherConfig(name=name, model="", carrier="sampled") for name in ("both", "first"))
    scores = [[sampled(-0.5, -1.25), sampled(-3.0)], [sampled(-0.25, -0.5), None]]
    batches = pack(
        rollouts(), micro_batch_size=2, length_multiple=1, device=torch.device("cpu"), scores=scores,
        weights=[[0.5, 0.5], [1.0, 0.0]],
    )  # fmt: skip
    return batches, Distillation(c.LossConfig(kind="sampled"), 1.0, VocabShard.whole(9), teachers, (None, None))


def sampled(*logps):
    return Sampled(torch.tensor(logps))


def completions(run_dir, *, every=1, most=32, has_turns=False, tracker=None, **place):
    log = LogConfig(completions_every=every, completions=most)
    place = parallel(**place)
    return Completions(log, run_dir, place, TOKENIZER, tracker or Tracker(), has_turns=has_turns)


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]


def rollouts():
    ours = tiny.rollout((1, 2), (3, 4), source="add", index=7)
    others = replace(tiny.rollout((1, 2), (5,), index=8), origin="dataset", finish="length", reward=0.5)
    return [replace(ours, prompt=replace(ours.prompt, text="a ↦ b")), others]


def test_a_line_an_answer(tmp_path):
    completions(tmp_path).log(rollouts(), 3, *NO_TEACHER)
    ours, others = rows(tmp_path)
    assert ours == {
        **{"step": 3, "source": "add", "index": 7, "sample": 0, "origin": "student", "prompt": "a ↦ b"},
        **{"response": "cd", "length": 2, "finish": "stop", "reward": None},
        "logprob": pytest.approx(sum(rollouts()[0].logps)),
    }
    assert others["logprob"] is None  # it has none
    assert (others["origin"], others["finish"], others["reward"]) == ("dataset", "length", 0.5)


def test_who_said_what_in_an_episode(tmp_path):
    tables, tracker = [], Tracker()
    tracker.table = lambda name, rows, step: tables.append(rows)
    log = EpisodeLog(turns=2, calls=1, failures={"not_json": 1}, ended="answered")
    played = replace(tiny.rollout((1, 2), (3, 4, 5, 6), learnt=(1, 1, 0, 1)), log=log)
    completions(tmp_path, has_turns=True, tracker=tracker).log([played, *rollouts()], 3, *NO_TEACHER)
    first, plain, _ = rows(tmp_path)
    assert first["said"] == [["policy", "cd"], ["environment", "e"], ["policy", "f"]]
    assert (first["part"], first["turns"], first["calls"], first["ended"]) == (0, 2, 1, "answered")
    assert first["failures"] == {"not_json": 1}
    assert (plain["said"], plain["ended"]) == ([["policy", "cd"]], "")
    ((row, *others),) = tables
    assert json.loads(row["said"]) == first["said"]  # its cells hold texts and numbers
    assert {tuple(row), *map(tuple, others)} == {tuple(row)}


def test_what_each_teacher_says_of_the_whole_answer(tmp_path):
    completions(tmp_path).log(rollouts(), 3, *told_by_two())
    found = [{name: x for name, x in row.items() if name.startswith("logprob/")} for row in rows(tmp_path)]
    assert found == [{"logprob/both": -1.75, "logprob/first": -0.75}, {"logprob/both": -3.0, "logprob/first": None}]


def test_every_so_many_steps_and_no_more_than_so_many(tmp_path):
    table = completions(tmp_path, every=2, most=3, replicas=2)
    for step in range(1, 5):
        table.log(rollouts(), step, *NO_TEACHER)
    assert [row["step"] for row in rows(tmp_path)] == [2, 2, 2, 4, 4, 4]


@pytest.fixture
def asked(monkeypatch):
    """Every look at a student that knows nothing, on answers to two teachers: (student, term, micro-batches)."""
    monkeypatch.setattr(token_tables, "Texts", lambda tokenizer: SimpleNamespace(tokenizer=tokenizer, of=str))
    batches, term = told_by_two()
    logits = torch.zeros(len(batches[0].targets_T), 9)
    return SimpleNamespace(measure=lambda its, read: [read(batch, logits) for batch in its]), term, batches


def test_scores_of_tokens_of_the_same_answers(tmp_path, asked):
    student, term, batches = asked
    table = completions(tmp_path, every=2, most=1)
    for step in (1, 2, 3, 4):
        table.look(student, term, rollouts=rollouts(), batches=batches, step=step)
        table.log(rollouts(), step, batches, term)
    assert list(token_file.files(tmp_path)) == [2, 4]
    (row,) = token_file.read(token_file.path_of(tmp_path, 4)).rows
    (line,) = [line for line in rows(tmp_path) if line["step"] == 4]
    assert {name: row[name] for name in row.keys() & line.keys()} == {
        name: line[name] for name in row.keys() & line.keys()
    }
    table.rewind(3)
    assert list(token_file.files(tmp_path)) == [2]


def test_scores_of_an_answer_of_others_have_no_sampler(tmp_path, asked):
    student, term, batches = asked
    batches = [replace(batches[0], on_policy_T=torch.tensor([True, True, False]))]
    completions(tmp_path).look(student, term, rollouts=rollouts(), batches=batches, step=1)
    table = pandas.read_parquet(tmp_path / "tokens")
    assert table["origin"].tolist() == ["student", "dataset"]
    assert [np.isnan(x).tolist() for x in table["logp_sampler"]] == [[False, False], [True]]
    assert table["logp/both"][1].tolist() == [-3.0]
    assert np.isnan(table["logp/first"][1]).all()  # it was not asked
    np.testing.assert_allclose(table["kl/both"][0], [0.5 - math.log(9), 1.25 - math.log(9)], rtol=1e-5)


@pytest.mark.parametrize("place", [{"every": 0}, {"is_main": False}])
def test_nothing_is_written_where_it_is_off_or_elsewhere(tmp_path, place, asked):
    table = completions(tmp_path, **place)
    student, term, batches = asked
    table.log(rollouts(), 4, *NO_TEACHER)
    table.look(student, term, rollouts=rollouts(), batches=batches, step=4)
    table.rewind(1)
    assert list(tmp_path.iterdir()) == []


def test_a_resume_drops_what_comes_again_and_half_a_line(tmp_path):
    table = completions(tmp_path)
    for step in (1, 2, 3):
        table.log(rollouts(), step, *NO_TEACHER)
    with (tmp_path / "completions.jsonl").open("a") as file:
        file.write('{"step": 1, "sou')
    table.rewind(2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 1, 2, 2]
    table.log(rollouts(), 3, *NO_TEACHER)
    assert [row["step"] for row in rows(tmp_path)] == [1, 1, 2, 2, 3, 3]


def test_a_resume_with_what_answers_may_hold(tmp_path):
    """Characters that end a line for Python, though not in JSON; and half a line that ends within a character."""
    table = completions(tmp_path)
    odd = [replace(r, prompt=replace(r.prompt, text="a\u2028b\x85c\r\n\x1ed")) for r in rollouts()]
    table.log(odd, 1, *NO_TEACHER)
    with (tmp_path / "completions.jsonl").open("ab") as file:
        file.write('{"step": 1, "prompt": "↦'.encode()[:-1])
    table.rewind(2)
    written = (tmp_path / "completions.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["prompt"] for line in written if line] == ["a\u2028b\x85c\r\n\x1ed"] * 2


def test_a_table_of_wandb(tmp_path, monkeypatch):
    logged = []
    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=logged.append, finish=lambda: None)
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(Settings=dict, Error=RuntimeError, Table=dict, init=lambda **_: run)
    )
    with build_tracker(LogConfig(wandb="offline"), tmp_path, num_steps=4, settings={}) as tracker:
        tracker.table("completions", [{"step": 4, "response": "x"}, {"step": 4, "response": "y"}], 4)
    assert logged == [{"step": 4, "completions": {"columns": ["step", "response"], "data": [[4, "x"], [4, "y"]]}}]
