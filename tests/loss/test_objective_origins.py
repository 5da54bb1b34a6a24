"""The objective where answers come from several hands, against the dense formula: value, gradient, and what counts."""

from dataclasses import replace

import oracle
import pytest
import test_objective as one
import torch

from megatron_opd.config import LossConfig, TeacherConfig
from megatron_opd.core.scores import Hidden, Sampled
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.distillation import Distillation
from megatron_opd.loss.objective import Objective
from megatron_opd.loss.sampled_tokens import CrossEntropy, Entropy

T, SIZE = one.NUM_TOKENS, one.SIZE
NOT_ASKED = [1, 6, 7]
DISTILL = torch.tensor([1.0, 0.0, 0.6, 1.0, 0.6, 0.6, 0.0, 0.0, 1.0, 1.0, 0.6])
SFT = torch.where(DISTILL == 1, 0.0, 0.3)
OURS = DISTILL == 1


def mixed_batch(sampling_temperature=1.0):
    hidden, heads, batch = one.teachers_and_batch(sampling_temperature)
    weights = batch.weights_TN.clone()
    weights[NOT_ASKED] = 0.0
    logp_T = batch.behaviour_logp_T.clone()
    logp_T[~OURS] = 0.0  # there are none
    return (
        hidden,
        heads,
        replace(batch, weights_TN=weights, on_policy_T=OURS, behaviour_logp_T=logp_T).weighing(
            distill=DISTILL, sft=SFT
        ),
    )


def objective(parallel, heads, config):
    return replace(
        one.objective_on(parallel, heads, config), sampled=(CrossEntropy(), Entropy()), has_answers_of_others=True
    )


def dense(beta, how, temperature):
    """(sum of the loss, its gradient) in float64."""
    hidden, heads, batch = mixed_batch()
    teachers = [
        oracle.log_softmax(h.double() @ w.double().T, SIZE, temperature) for h, w in zip(hidden, heads, strict=True)
    ]
    weights = batch.weights_TN.clone()
    weights[NOT_ASKED] = 0.5  # whatever: their distillation has weight 0
    target = oracle.ensemble(teachers, weights, how)
    asked = torch.ones(T, dtype=torch.bool)
    asked[NOT_ASKED] = False

    def loss(z):
        apart = oracle.divergence(oracle.log_softmax(z, SIZE, temperature), target, beta)
        said = oracle.log_softmax(z, SIZE, 1.0).gather(-1, batch.targets_T[:, None])[:, 0]
        return one.UPSTREAM * (torch.where(asked, DISTILL * apart, 0.0) - SFT * said)

    value, gradient = oracle.grad(loss, one.student_logits())
    return value.sum() / one.UPSTREAM, gradient


CASES = [(1.0, "logits", 1.0, 4), (0.0, "probs", 0.7, 100), (0.5, "logits", 1.0, 3)]


def all_cases(parallel):
    _, heads, batch = mixed_batch()
    made = [LossConfig(beta=b, ensemble=how, temperature=t, chunk_tokens=size) for b, how, t, size in CASES]
    return [one.loss_gradient_metrics(objective(parallel, heads, m), batch, one.student_logits()) for m in made]


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_loss_and_gradient_equal_the_dense_formula(ranks, tensor_size):
    answers = ranks.run(tensor_size, all_cases)
    for i, case in enumerate(CASES):
        value, gradient = dense(*case[:3])
        for loss, _, num_tokens, means in (shards[i] for shards in answers):
            assert loss == pytest.approx(float(value), rel=1e-5)
            assert num_tokens.item() == T  # all of them share the mean
            assert means["loss"] == pytest.approx(float(value) / T, rel=1e-5)
        whole = torch.cat([shards[i][1] for shards in answers], dim=-1)
        torch.testing.assert_close(whole.double(), gradient, **one.TOLERANCE)


def test_metrics_leave_out_what_they_are_not_about():
    _, heads, batch = mixed_batch()
    *_, means = one.loss_gradient_metrics(objective(None, heads, LossConfig()), batch, one.student_logits())
    assert means["mismatch/kl"] == pytest.approx(0, abs=1e-10)  # of the student's own tokens, which agree
    said = oracle.log_softmax(one.student_logits(), SIZE).gather(-1, batch.targets_T[:, None])[:, 0]
    assert means["sft/nll"] == pytest.approx(-float(said[SFT > 0].mean()), rel=1e-5)
    assert means["logprob/student"] == pytest.approx(float(said[DISTILL > 0].mean()), rel=1e-5)


def test_answers_that_nobody_is_asked_about():
    """Fine-tuning without teachers."""
    _, _, batch = mixed_batch()
    term = Distillation(LossConfig(), 1.0, VocabShard(0, one.COLUMNS, SIZE), (), ())
    alone = Objective(term, sampled=(CrossEntropy(), Entropy()), has_answers_of_others=True)
    batch = replace(batch, weights_TN=torch.zeros(T, 0), teachers=())
    batch = batch.weighing(distill=torch.zeros(T), sft=torch.full((T,), 0.5))
    loss, gradient, num_tokens, means = one.loss_gradient_metrics(alone, batch, one.student_logits())

    def nats(z):
        return -0.5 * oracle.log_softmax(z, SIZE).gather(-1, batch.targets_T[:, None])[:, 0]

    value, expected = oracle.grad(lambda z: one.UPSTREAM * nats(z), one.student_logits())
    assert loss == pytest.approx(float(value.sum()) / one.UPSTREAM, rel=1e-5)
    assert num_tokens.item() == T
    torch.testing.assert_close(gradient.double(), expected, **one.TOLERANCE)
    assert means["kl/ensemble"] is None


def test_sampled_teachers_have_no_part_in_others_answers():
    """A policy gradient of the student's tokens alone, next to the cross-entropy of the others'."""
    _, _, batch = mixed_batch()
    teachers = (TeacherConfig(name="t", model="", backend="sglang", carrier="sampled"),)
    told = torch.linspace(-3, -1, T)
    batch = replace(batch, teachers=(Sampled(told),), weights_TN=OURS[:, None].float()).weighing(distill=OURS.float())
    term = Distillation(LossConfig(kind="sampled"), 1.0, VocabShard(0, one.COLUMNS, SIZE), teachers, (None,))
    made = Objective(term, sampled=(CrossEntropy(), Entropy()), has_answers_of_others=True)
    changed = replace(batch, teachers=(Sampled(torch.where(OURS, told, -50.0)),))
    found = [one.loss_gradient_metrics(made, b, one.student_logits()) for b in (batch, changed)]
    torch.testing.assert_close(found[0][1], found[1][1])
    assert found[0][0] == found[1][0]
    assert found[0][3]["importance/mean"] == pytest.approx(1.0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_teacher_that_is_the_student_leaves_the_cross_entropy(beta):
    hidden, heads, batch = mixed_batch()
    batch = replace(batch, weights_TN=(DISTILL > 0)[:, None].float(), teachers=(Hidden(hidden[1]),))
    logits = torch.nn.functional.pad(hidden[1] @ heads[1].T, (0, one.COLUMNS - one.HEAD_ROWS[1]))
    _, gradient, _, means = one.loss_gradient_metrics(objective(None, heads[1:], LossConfig(beta=beta)), batch, logits)
    assert gradient[SFT == 0].abs().max() <= 2e-6
    assert gradient[SFT > 0].abs().amax(-1).min() > 1e-3
    assert means["kl/ensemble"] == 0
