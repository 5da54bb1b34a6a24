"""Scores of single tokens, by teachers of every carrier at every tensor-parallel size: dense float64 formulas."""

import oracle
import pytest
import test_carriers as carriers
import torch
from test_carriers import NUM_TOKENS, SIZE, made

from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss import by_token
from megatron_opd.loss.distillation import Distillation
from megatron_opd.loss.fused import FactoredLogits

CANDIDATES = 7
"""More than some teachers list."""
MIXTURES = [i for i, (_, _, beta) in enumerate(carriers.CASES) if beta == 1.0]


def on_shard(parallel, index):
    """From logits, and from hidden states and head."""
    case = made(index)
    term, here = carriers.term_here(case, parallel)
    logits = case.logits[:, here].contiguous()
    factored = FactoredLogits(torch.eye(NUM_TOKENS), logits.T.contiguous())
    return [by_token.measure(term, case.batch, student, CANDIDATES) for student in (logits, factored)]


def all_cases(parallel):
    return [on_shard(parallel, index) for index in MIXTURES]


@pytest.fixture(scope="module", params=[1, 2, 4], ids="tp{}".format)
def computed(request, ranks):
    return ranks.run(request.param, all_cases)


def likeliest(case, n, t):
    """{id: log-probability} of a teacher's likeliest tokens, as far as it is known."""
    if case.carriers[n] == "sampled":
        return {}
    exact = case.carriers[n] == "hidden"
    known = (
        dict(enumerate(carriers.exact_at(case, n, t).tolist()))
        if exact
        else carriers.known_at(case.batch.teachers[n], t)
    )
    real = [(x, i) for i, x in known.items() if 0 <= i < SIZE]
    return {i: x for x, i in sorted(real, reverse=True)[:CANDIDATES]}


def candidates(found, of, t):
    ids, logps = found[f"top_id{of}"][t], found[f"top_logp{of}"][t]
    return {int(i): x for i, x in zip(ids.tolist(), logps.tolist(), strict=True) if i == i}


@pytest.mark.parametrize("at", range(len(MIXTURES)), ids=["+".join(carriers.CASES[i][1]) for i in MIXTURES])
def test_numbers_of_every_token(computed, at):
    case = made(MIXTURES[at])
    _, _, wanted = carriers.expected(case)
    logq = oracle.log_softmax(case.logits, SIZE)
    top = logq.topk(CANDIDATES)
    close = {"atol": 1e-5, "rtol": 1e-5, "check_dtype": False}
    for shard in computed:
        for found in shard[at]:
            torch.testing.assert_close(found["logp"], logq.gather(-1, case.batch.targets_T[:, None])[:, 0], **close)
            torch.testing.assert_close(found["entropy"], -(logq.exp() * logq).sum(-1), **close)
            torch.testing.assert_close(found["top_id"], top.indices, check_dtype=False)
            torch.testing.assert_close(found["top_logp"], top.values, **close)
            torch.testing.assert_close(found["logp_target"], torch.tensor(wanted["logprob/teacher"]), **close)
            torch.testing.assert_close(found["kl"], torch.tensor(wanted["kl/ensemble"]), **close)
            for n in range(len(case.carriers)):
                asked = case.batch.weights_TN[:, n] > 0
                torch.testing.assert_close(found[f"kl/t{n}"][asked], torch.tensor(wanted[f"kl/t{n}"]), **close)
                for name in (f"kl/t{n}", f"logp/t{n}", f"top_id/t{n}", f"top_logp/t{n}"):
                    assert found[name][~asked].isnan().all(), name
                for t in asked.nonzero()[:, 0].tolist():
                    assert found[f"logp/t{n}"][t].item() == pytest.approx(float(carriers.sampled_at(case, n, t)), 1e-5)
                    assert candidates(found, f"/t{n}", t) == pytest.approx(likeliest(case, n, t), abs=1e-5)


def test_tokens_that_no_teacher_was_asked_about():
    case = made(0)
    term = Distillation(case.config, 1.0, VocabShard.whole(SIZE), case.teachers, tuple(case.heads))
    case.batch.weights_TN[2:] = 0
    found = by_token.measure(term, case.batch, case.logits[:, :SIZE], CANDIDATES)
    assert not found["logp"].isnan().any()
    assert found["kl"].isnan().tolist() == found["kl/t0"].isnan().tolist() == [False, False, *[True] * (NUM_TOKENS - 2)]


def test_without_a_teacher():
    case = made(0)
    batch = carriers.tiny.micro_batch(case.batch.targets_T, case.batch.behaviour_logp_T, torch.zeros(NUM_TOKENS, 0), ())
    term = Distillation(case.config, 1.0, VocabShard.whole(SIZE), (), ())
    found = by_token.measure(term, batch, case.logits[:, :SIZE], 2 * SIZE)
    assert found["kl"].isnan().all()
    assert (~found["top_id"].isnan()).sum(-1).tolist() == [SIZE] * NUM_TOKENS  # there are no more
