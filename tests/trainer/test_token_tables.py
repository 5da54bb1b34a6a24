"""Scores of the tokens of logged answers: on every layout those of one rank; the training keeps its bits."""

import pytest
import steps
import test_step_invariance as invariance
import torch
import two_cuts
from test_step_invariance import paths  # noqa: F401

from megatron_opd.models.tokenizer import load_tokenizer
from megatron_opd.trainer import token_tables

COUNT = 3
"""Answers of a replica: a micro-batch and a half."""
LAYOUTS = {
    "tp2": {"tensor": 2},
    "pp2tp2sp": {"tensor": 2, "pipeline": 2, "sequence": True},
    "cp2": {"context": 2},
    "dp2": {"data": 2},
}


def scored(parallel, config, rollouts):
    """(answers, their scores, what a step then makes of the student)."""
    student, objective, pack = steps.build(parallel, config, invariance.VOCAB_SIZE)
    batches = pack(rollouts[parallel.data_rank :: parallel.data_size])
    mine = rollouts[parallel.data_rank :: parallel.data_size][:COUNT]
    found = token_tables.measured(student, objective.distillation, rollouts=mine, batches=batches, parallel=parallel)
    return *found, student.step(batches, objective), dict(student.export())


def plain(parallel, config, rollouts):
    student, objective, pack = steps.build(parallel, config, invariance.VOCAB_SIZE)
    return student.step(pack(rollouts[parallel.data_rank :: parallel.data_size]), objective), dict(student.export())


@pytest.fixture(scope="module")
def given(paths):  # noqa: F811
    return invariance.config(paths, "qwen3", "jsd"), invariance.rollouts()[2:]


@pytest.fixture(scope="module")
def of_one_rank(ranks, given):
    """By answer, of more answers than a replica has."""
    config, made = given
    [(answers, scores, *_)] = ranks.run(1, all_scored, config, made, tensor=1)
    return {(r.prompt.source, r.prompt.index, r.sample): its for r, its in zip(answers, scores, strict=True)}


def all_scored(parallel, config, rollouts):
    student, objective, pack = steps.build(parallel, config, invariance.VOCAB_SIZE)
    how = {"rollouts": rollouts, "batches": pack(rollouts), "parallel": parallel}
    return token_tables.measured(student, objective.distillation, **how)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_scores_are_those_of_one_rank_and_leave_the_step_alone(ranks, given, of_one_rank, layout):
    config, made = given
    size, data = torch.tensor([n for n in layout.values() if n is not True]).prod().item(), layout.get("data", 1)
    untouched = ranks.run(size, plain, config, made, **layout)
    for rank, (answers, scores, metrics, weights) in enumerate(ranks.run(size, scored, config, made, **layout)):
        assert answers == [r for replica in range(data) for r in made[replica::data][:COUNT]]
        for rollout, found in zip(answers, scores, strict=True):
            expected = of_one_rank[rollout.prompt.source, rollout.prompt.index, rollout.sample]
            assert found.keys() == expected.keys()
            for name, x in found.items():
                torch.testing.assert_close(
                    torch.tensor(x), torch.tensor(expected[name]), atol=1e-5, rtol=1e-4, equal_nan=True, msg=name
                )
        assert metrics == untouched[rank][0]
        assert all(torch.equal(x, untouched[rank][1][name]) for name, x in weights.items())


def of_the_first_replica(parallel, config, rollouts):
    mine = rollouts if parallel.data_rank == 0 else []
    return all_scored(parallel, config, mine)[0]


def test_replicas_with_nothing_to_show_ask_nobody(ranks, given):
    config, made = given
    assert ranks.run(2, of_the_first_replica, config, made, data=2) == [made] * 2


def test_what_is_scored(of_one_rank):
    (its,) = {frozenset(found) for found in of_one_rank.values()}
    assert its == {
        *("logp_sampler", "advantage", "entropy", "kl", "logp", "logp_target", "top_id", "top_logp"),
        *(f"{name}/{t}" for t in ("t0", "t1") for name in ("logp", "kl", "top_id", "top_logp")),
    }


def test_texts_of_tokens(tmp_path):
    byte = token_tables.Texts(load_tokenizer(two_cuts.byte_level(tmp_path / "byte")))
    piece = token_tables.Texts(load_tokenizer(two_cuts.sentencepiece(tmp_path / "piece")))
    for texts, eos in ((byte, "<|end|>"), (piece, "</s>")):
        ids = texts.tokenizer.encode(" the quick fox")
        assert "".join(texts.of(i) for i in ids).strip() == "the quick fox"
        assert texts.of(texts.tokenizer.eos_id) == eos
        assert texts.of(10**6)  # the head of a model may be longer than its vocabulary
    assert "\\xe2" in "".join(byte.of(i) for i in byte.tokenizer.encode("☃"))  # a part of a character
