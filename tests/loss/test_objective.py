"""Objective: hidden states and head rows to loss, gradient and metrics, chunked, at every tensor-parallel size."""

import math
from dataclasses import replace
from itertools import product

import oracle
import pytest
import tiny
import torch

from megatron_opd.config import LossConfig, TeacherConfig
from megatron_opd.core.scores import Hidden
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss import metrics as term_metrics
from megatron_opd.loss.distillation import Distillation
from megatron_opd.loss.fused import FactoredLogits  # noqa: F401  for others' cases
from megatron_opd.loss.objective import Objective

NUM_TOKENS, COLUMNS, SIZE = 11, 48, 35
HEAD_ROWS = (35, 41)
"""Rows of the teachers' heads: fewer and more than the student has columns on some shards."""
UPSTREAM = 2.5
TOLERANCE = {"atol": 3e-5, "rtol": 1e-5}


def student_logits(seed=0):
    logits = 2 * torch.randn(NUM_TOKENS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    logits[:, SIZE:] = 60.0
    return logits


def teachers_and_batch(sampling_temperature=1.0):
    """(hidden [T, D_n], heads [V_n, D_n], batch): the first three tokens are not for teacher 0, the next not for 1."""
    generator = torch.Generator().manual_seed(1)
    hidden = [torch.randn(NUM_TOKENS, size, generator=generator) for size in (8, 6)]
    heads = [torch.randn(rows, h.shape[1], generator=generator) for rows, h in zip(HEAD_ROWS, hidden, strict=True)]
    weights = torch.rand(NUM_TOKENS, 2, generator=generator) + 0.1
    weights[:3, 0] = 0.0
    weights[3:5, 1] = 0.0
    hidden[0][:3] = 0.0
    hidden[1][3:5] = 0.0
    targets = torch.randint(0, SIZE, (NUM_TOKENS,), generator=generator)
    logp = oracle.log_softmax(student_logits(), SIZE, sampling_temperature)
    behaviour = logp.gather(-1, targets[:, None])[:, 0].float()
    told = tuple(Hidden(h) for h in hidden)
    batch = tiny.micro_batch(targets, behaviour, weights / weights.sum(-1, keepdim=True), told)
    return hidden, heads, batch


def objective_on(parallel, heads, config, sampling_temperature=1.0):
    """The objective of this rank's columns; heads are cut along them, rows that a teacher lacks are 0."""
    share = COLUMNS // (parallel.tensor_size if parallel else 1)
    start = share * (parallel.tensor_rank if parallel else 0)
    padded = [torch.cat([h, h.new_zeros(COLUMNS - h.shape[0], h.shape[1])])[start : start + share] for h in heads]
    group = parallel.tensor_group if parallel and parallel.tensor_size > 1 else None
    vocab = VocabShard(start, start + share, SIZE, group)
    teachers = tuple(TeacherConfig(name=name, model="") for name in ("small", "large")[: len(heads)])
    return Objective(Distillation(config, sampling_temperature, vocab, teachers, tuple(padded)))


def loss_gradient_metrics(objective, batch, logits):
    vocab = objective.distillation.vocab
    mine = logits[:, vocab.start : vocab.stop].clone().requires_grad_()
    loss, num_tokens, metrics = objective(batch, mine)
    (UPSTREAM * loss).backward()
    return loss.item(), mine.grad, num_tokens, means_of(objective, metrics)


def means_of(objective, metrics):
    """By name of every metric that the objective declares; None for one without tokens."""
    assert {*metrics} <= {*objective.metric_names()}
    sums = {name: metrics[name].tolist() if name in metrics else (0.0, 0) for name in objective.metric_names()}
    return {name: (total / n if n else None) for name, (total, n) in sums.items()}


TEMPERATURE_AND_CHUNK = ((0.5, 4), (1.0, 100), (1.0, 1), (2.0, 4))
CASES = [(beta, how, *rest) for beta, how, rest in product((0.0, 0.5, 1.0), ("logits", "probs"), TEMPERATURE_AND_CHUNK)]


def all_cases(parallel):
    _, heads, batch = teachers_and_batch()
    answers = []
    for beta, how, temperature, chunk_tokens in CASES:
        config = LossConfig(beta=beta, ensemble=how, temperature=temperature, chunk_tokens=chunk_tokens)
        answers.append(loss_gradient_metrics(objective_on(parallel, heads, config), batch, student_logits()))
    return answers


@pytest.fixture(scope="module", params=[1, 2, 4], ids="tp{}".format)
def computed(request, ranks):
    return ranks.run(request.param, all_cases)


def expected(beta, how, temperature, logits=None):
    """(loss sum, gradient of UPSTREAM x loss, metrics), dense and in float64."""
    hidden, heads, batch = teachers_and_batch()
    logits = student_logits() if logits is None else logits
    teachers = [
        oracle.log_softmax(h.double() @ head.double().T, SIZE, temperature)
        for h, head in zip(hidden, heads, strict=True)
    ]
    target = oracle.ensemble(teachers, batch.weights_TN, how)
    loss, gradient = oracle.grad(
        lambda z: UPSTREAM * oracle.divergence(oracle.log_softmax(z, SIZE, temperature), target, beta), logits
    )
    student = oracle.log_softmax(logits, SIZE, temperature)
    ids = batch.targets_T[:, None]
    lag = oracle.log_softmax(logits, SIZE, 1.0).gather(-1, ids)[:, 0] - batch.behaviour_logp_T.double()
    metrics = {
        "loss": loss.mean() / UPSTREAM,
        "kl/ensemble": oracle.kl(student, target).mean(),
        "kl/small": oracle.kl(student, teachers[0])[3:].mean(),
        "kl/large": oracle.kl(student, teachers[1])[[0, 1, 2, *range(5, NUM_TOKENS)]].mean(),
        "logprob/student": student.gather(-1, ids).mean(),
        "logprob/teacher": target.gather(-1, ids).mean(),
        "mismatch/kl": (lag.exp() - 1 - lag).mean(),
    }
    return loss.sum() / UPSTREAM, gradient, metrics


@pytest.mark.parametrize(("beta", "how"), list(product((0.0, 0.5, 1.0), ("logits", "probs"))))
def test_loss_gradient_and_metrics_equal_the_dense_formula(computed, beta, how):
    for i, case in [(i, case) for i, case in enumerate(CASES) if case[:2] == (beta, how)]:
        loss, gradient, metrics = expected(*case[:3])
        shards = [answers[i] for answers in computed]
        for value, _, num_tokens, means in shards:
            assert value == pytest.approx(float(loss), rel=1e-5)
            assert (num_tokens.item(), num_tokens.dtype) == (NUM_TOKENS, torch.int32)
            assert means == pytest.approx({name: float(x) for name, x in metrics.items()}, rel=1e-5, abs=1e-6)
        whole = torch.cat([shard[1] for shard in shards], dim=-1)
        torch.testing.assert_close(whole.double(), gradient, **TOLERANCE, msg=f"gradient of {case}")
        assert (whole[:, SIZE:] == 0).all()


def alone(config=None, heads=None, sampling_temperature=1.0):
    """The objective without tensor parallelism."""
    heads = teachers_and_batch()[1] if heads is None else heads
    return objective_on(None, heads, config or LossConfig(), sampling_temperature)


@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("how", ["logits", "probs"])
def test_teacher_that_was_asked_about_no_token(asked, how):
    """It may come without rows; the loss is the other's and its metric has no tokens."""
    _, _, batch = teachers_and_batch()
    only = tuple(h if n == asked else None for n, h in enumerate(batch.teachers))
    batch = replace(batch, teachers=only, weights_TN=torch.eye(2)[[asked] * NUM_TOKENS])
    loss, gradient, _, means = loss_gradient_metrics(alone(LossConfig(ensemble=how)), batch, student_logits())
    assert loss == pytest.approx(NUM_TOKENS * means["kl/ensemble"])
    assert means["kl/ensemble"] == pytest.approx(means[("kl/small", "kl/large")[asked]])
    assert means[("kl/large", "kl/small")[asked]] is None
    assert gradient.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_teacher_that_is_the_student(beta):
    hidden, heads, batch = teachers_and_batch()
    batch = replace(batch, weights_TN=torch.ones(NUM_TOKENS, 1), teachers=(Hidden(hidden[1]),))
    logits = torch.nn.functional.pad(hidden[1] @ heads[1].T, (0, COLUMNS - HEAD_ROWS[1]))
    loss, gradient, _, means = loss_gradient_metrics(alone(LossConfig(beta=beta), heads[1:]), batch, logits)
    assert abs(loss) <= (0 if beta in (0, 1) else 1e-5)
    assert gradient.abs().max() <= 2e-6
    assert means["kl/ensemble"] == 0
    assert means["logprob/student"] == means["logprob/teacher"]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_mismatch_is_zero_when_sampler_and_trainer_agree(temperature):
    """At the sampler's temperature, whatever the loss's is."""
    _, heads, batch = teachers_and_batch(sampling_temperature=temperature)
    for loss_temperature in (1.0, 2.0):
        objective = alone(LossConfig(temperature=loss_temperature), heads, temperature)
        assert loss_gradient_metrics(objective, batch, student_logits())[3]["mismatch/kl"] == pytest.approx(
            0, abs=1e-10
        )
    wrong = alone(LossConfig(), heads, temperature + 0.5)
    assert loss_gradient_metrics(wrong, batch, student_logits())[3]["mismatch/kl"] > 1e-3


def test_without_gradient_the_metrics_are_the_same():
    _, _, batch = teachers_and_batch()
    with torch.no_grad():
        loss, _, metrics = alone(LossConfig(chunk_tokens=3))(batch, student_logits())
    again, _, expected_metrics = alone()(batch, student_logits().requires_grad_())
    assert not loss.requires_grad
    torch.testing.assert_close(loss, again.detach())
    torch.testing.assert_close(metrics, expected_metrics)


def test_half_precision_logits_lose_nothing_in_the_loss():
    """Temperature and softmax are in float32; only the gradient is rounded back."""
    _, _, batch = teachers_and_batch()
    logits = student_logits().bfloat16()
    loss, gradient, _ = expected(0.0, "logits", 0.7, logits)
    mine, my_gradient, _, _ = loss_gradient_metrics(alone(LossConfig(beta=0.0, temperature=0.7)), batch, logits)
    assert mine == pytest.approx(float(loss), rel=1e-5)
    assert my_gradient.dtype == torch.bfloat16
    torch.testing.assert_close(my_gradient.double(), gradient, atol=2e-2, rtol=1e-2)


def test_mismatch_estimates_the_divergence_from_the_sampler_to_the_trainer():
    """Of four tokens that the sampler draws equally often its mean is KL(sampler || trainer), not the other one."""
    trainer = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    batch = tiny.micro_batch(torch.arange(4), torch.full((4,), 0.25).log(), torch.ones(4, 1), (None,))
    of_student = replace(batch, on_policy_T=torch.tensor([True, False, True, True]))
    estimates = term_metrics.mismatch(trainer.log(), batch)
    assert estimates.mean().item() == pytest.approx((0.25 * (0.25 / trainer).log()).sum().item(), rel=1e-6)
    assert torch.equal(term_metrics.mismatch(trainer.log(), of_student), estimates[[0, 2, 3]])


@pytest.mark.parametrize("lag", [1e-2, -1e-2, 1e-3, -1e-3])
def test_a_small_mismatch_is_not_lost_in_rounding(lag):
    """In float32, where e^l - 1 has none of l²/2 any more."""
    batch = tiny.micro_batch(torch.arange(1), torch.zeros(1), torch.ones(1, 1), (None,))
    (estimate,) = term_metrics.mismatch(torch.tensor([lag]), batch).tolist()
    assert estimate == pytest.approx(math.exp(lag) - 1 - lag, rel=2e-3)
