"""Divergences and ensembles over a sharded, padded vocabulary: values and gradients against dense float64 formulas."""

import math
from itertools import product

import oracle
import pytest
import torch

from megatron_opd import loss as losses
from megatron_opd.core.vocab import PADDING_LOGP, VocabShard
from megatron_opd.loss import ensemble

NUM_TOKENS, COLUMNS, SIZE = 7, 48, 35
"""At TP=4 a shard has 12 columns, and the last one is padding only."""

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
CASES = list(product(BETAS, ("logits", "probs"), (1, 2, 3), (0.5, 1.0, 2.0)))  # beta, ensemble, teachers, temperature
TOLERANCES = {torch.float32: {"atol": 2e-5, "rtol": 2e-5}, torch.float64: {"atol": 1e-10, "rtol": 1e-10}}


def inputs(case, dtype):
    """Student logits, N teachers' logits, weights [T, N] (a one-hot row, a row with a zero), a factor per token."""
    generator = torch.Generator().manual_seed(CASES.index(case))
    num_teachers = case[2]
    logits = 3 * torch.randn(1 + num_teachers, NUM_TOKENS, COLUMNS, generator=generator, dtype=torch.float64)
    logits[:, 4] *= 4  # nearly certain tokens
    logits[:, 5] += 40.0  # a softmax does not see a constant
    logits[..., SIZE:] = 77.0  # and must not see the padding
    weights = torch.rand(NUM_TOKENS, num_teachers, generator=generator) + 0.05
    weights[0] = torch.eye(num_teachers)[-1]
    weights[1, 0] = 0.0 if num_teachers > 1 else 1.0
    weights /= weights.sum(-1, keepdim=True)
    factor = torch.rand(NUM_TOKENS, generator=generator) + 0.5
    return logits[0].to(dtype), [x.to(dtype) for x in logits[1:]], weights.to(dtype), factor.to(dtype)


def on_shard(logits, teachers, weights, factor, case, vocab):
    """Loss [T] of this shard's columns and the gradient of sum(factor * loss) [T, L], by the code under test."""
    beta, how, _, temperature = case
    here = slice(vocab.start, vocab.stop)
    mine = logits[:, here].clone().requires_grad_()
    student = vocab.log_softmax(mine / temperature)
    rows = [z[:, here] / temperature for z in teachers]
    if how == "probs":
        target = ensemble.mean_probs([vocab.log_softmax(z) for z in rows], weights)
    else:
        target = ensemble.mean_logits(rows, weights, vocab)
    loss = losses.divergence(student, target, vocab, beta)
    (factor * loss).sum().backward()
    return loss.detach(), mine.grad


def shard_of(parallel, columns, size):
    share = columns // parallel.tensor_size
    start = parallel.tensor_rank * share
    return VocabShard(start, start + share, size, parallel.tensor_group if parallel.tensor_size > 1 else None)


def all_cases(parallel):
    vocab = shard_of(parallel, COLUMNS, SIZE)
    return [on_shard(*inputs(case, dtype), case, vocab) for dtype in TOLERANCES for case in CASES]


@pytest.fixture(scope="module", params=[1, 2, 4], ids="tp{}".format)
def computed(request, ranks):
    """Every case's loss by rank and gradient over all columns, at one tensor-parallel size."""
    by_rank = ranks.run(request.param, all_cases)
    keys = [(dtype, case) for dtype in TOLERANCES for case in CASES]
    losses_of = {key: [answers[i][0] for answers in by_rank] for i, key in enumerate(keys)}
    gradients = {key: torch.cat([answers[i][1] for answers in by_rank], dim=-1) for i, key in enumerate(keys)}
    return losses_of, gradients


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("beta", "how"), list(product(BETAS, ("logits", "probs"))))
def test_value_and_gradient_equal_the_dense_formula(computed, beta, how, dtype):
    losses_of, gradients = computed
    for case in [case for case in CASES if case[:2] == (beta, how)]:
        logits, teachers, weights, factor = inputs(case, dtype)
        target = oracle.ensemble([oracle.log_softmax(z, SIZE, case[3]) for z in teachers], weights, how)

        def weighted(z, case=case, target=target, factor=factor):
            return factor.double() * oracle.divergence(oracle.log_softmax(z, SIZE, case[3]), target, case[0])

        expected, expected_gradient = oracle.grad(weighted, logits)
        for loss in losses_of[dtype, case]:  # the same on every shard
            torch.testing.assert_close(loss.double() * factor, expected, **TOLERANCES[dtype], msg=f"{case}")
        gradient = gradients[dtype, case].double()
        torch.testing.assert_close(gradient, expected_gradient, **TOLERANCES[dtype], msg=f"gradient of {case}")
        assert (gradient[:, SIZE:] == 0).all()


def operations(parallel):
    vocab = shard_of(parallel, COLUMNS, SIZE)
    x = torch.arange(2.0 * COLUMNS, dtype=torch.float64).reshape(2, COLUMNS)[:, vocab.start : vocab.stop]
    x = x.clone().requires_grad_()
    picked = vocab.gather(x, torch.tensor([[0, 11, 12], [47, 24, 23]]))
    (picked * torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).sum().backward()
    z = torch.sin(x.detach()).requires_grad_()
    logp = vocab.log_softmax(z, 0.7)
    (logp * torch.cos(x.detach())).sum().backward()
    return picked.detach(), x.grad, vocab.sum(x.detach()), logp.detach(), z.grad


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_operations_over_shards(ranks, num_ranks):
    by_rank = ranks.run(num_ranks, operations)
    for picked, _, total, *_ in by_rank:
        assert picked.tolist() == [[0, 11, 12], [95, 72, 71]]
        assert total.tolist() == [sum(range(48)), sum(range(48, 96))]
    gradient = torch.cat([answer[1] for answer in by_rank], dim=-1)
    expected = torch.zeros(2, COLUMNS, dtype=torch.float64)
    for row, column, value in ((0, 0, 1), (0, 11, 2), (0, 12, 3), (1, 47, 4), (1, 24, 5), (1, 23, 6)):
        expected[row, column] = value
    assert torch.equal(gradient, expected)
    logp, gradient = (torch.cat([answer[i] for answer in by_rank], dim=-1) for i in (3, 4))
    assert (logp[:, SIZE:] == PADDING_LOGP).all()
    x = torch.arange(2.0 * COLUMNS, dtype=torch.float64).reshape(2, COLUMNS)

    def log_softmax(z):
        return oracle.log_softmax(z, SIZE, 0.7) * torch.cos(x[:, :SIZE])

    expected, expected_gradient = oracle.grad(log_softmax, torch.sin(x))  # padding is a constant, whatever flows back
    torch.testing.assert_close(logp[:, :SIZE] * torch.cos(x[:, :SIZE]), expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize(
    ("beta", "value", "gradient"),
    [
        (0.0, 0.75 * math.log(1.5) + 0.25 * math.log(0.5), -0.25),  # q - p
        (1.0, 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), 0.25 * math.log(1 / 3)),
        (0.5, 0.0338222, -0.0638532),
    ],
)
def test_numbers_of_a_coin(beta, value, gradient):
    """p = (3/4, 1/4), q = (1/2, 1/2), m = (5/8, 3/8). Gradients: q - p; q (log q/p - KL); q (log q/m - KL) / 2."""
    vocab = VocabShard.whole(2)
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    loss = losses.divergence(vocab.log_softmax(logits), target, vocab, beta)
    loss.sum().backward()
    assert loss.item() == pytest.approx(value, abs=1e-6)
    assert logits.grad.tolist()[0] == pytest.approx([gradient, -gradient], abs=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_no_divergence_from_oneself(beta):
    vocab = VocabShard(0, 48, 35)
    logits = 5 * torch.randn(9, 48, generator=torch.Generator().manual_seed(0))
    student = logits.clone().requires_grad_()
    loss = losses.divergence(vocab.log_softmax(student), vocab.log_softmax(logits), vocab, beta)
    loss.sum().backward()
    assert loss.abs().max() <= (0 if beta in (0, 1) else 1e-6)
    assert student.grad.abs().max() <= 1e-6


def test_weights_of_zero_silence_a_teacher():
    """Whatever an unasked teacher's row holds, it has no influence."""
    vocab = VocabShard.whole(5)
    logits = [torch.randn(3, 5), 1e6 * torch.randn(3, 5)]
    weights = torch.tensor([[1.0, 0.0]] * 3)
    for mixed in (
        ensemble.mean_logits(logits, weights, vocab),
        ensemble.mean_probs([vocab.log_softmax(z) for z in logits], weights),
    ):
        torch.testing.assert_close(mixed, torch.log_softmax(logits[0], -1))


def test_half_precision_logits_are_normalised_in_float32():
    logits = torch.randn(4, 11).bfloat16()
    logp = VocabShard.whole(11).log_softmax(logits)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, torch.log_softmax(logits.float(), -1))


def listed_and_largest(parallel):
    """What is outside of some ids, its gradient, and the largest values, over this rank's shard."""
    vocab = shard_of(parallel, COLUMNS, SIZE)
    logits = list_logits()[:, vocab.start : vocab.stop].clone().requires_grad_()
    logp = vocab.log_softmax(logits)
    rest = vocab.log_rest(logp, LISTED)
    (rest * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    return rest.detach(), logits.grad, vocab.top(logp, 5), vocab.top(logp, COLUMNS)


LISTED = torch.tensor([[0, 11, 12, 0], [34, 24, -1, 23], [7, 40, 99, 7]])
"""Ids twice, of padding columns, and of none."""


def list_logits():
    logits = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(5))
    logits[0, [0, 11, 12]] += 27.0  # about 1e-12 is left
    logits[:, SIZE:] = 50.0
    return logits


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_rest_and_largest_over_shards(ranks, num_ranks):
    by_rank = ranks.run(num_ranks, listed_and_largest)

    def rest(z):
        logp = oracle.log_softmax(z, SIZE)
        others = [[v for v in range(SIZE) if v not in ids] for ids in LISTED.tolist()]
        return torch.stack([logp[t, ids].exp().sum().log() for t, ids in enumerate(others)])

    _, gradient = oracle.grad(lambda z: rest(z) * torch.tensor([1.0, 2.0, 3.0]), list_logits())
    assert rest(list_logits())[0] < math.log(1e-10)
    for found, _, five, everything in by_rank:
        torch.testing.assert_close(found.double(), rest(list_logits()), atol=4e-6, rtol=0)
        sorted_logp = oracle.log_softmax(list_logits(), SIZE).sort(-1, descending=True).values
        torch.testing.assert_close(five.double(), sorted_logp[:, :5], atol=4e-6, rtol=1e-6)
        torch.testing.assert_close(everything[:, :SIZE].double(), sorted_logp, atol=4e-6, rtol=1e-6)
    found = torch.cat([answer[1] for answer in by_rank], dim=-1)
    torch.testing.assert_close(found.double(), gradient, atol=5e-6, rtol=1e-6)


def test_rest_of_nothing_is_finite_and_has_no_gradient():
    logits = torch.randn(2, 3).requires_grad_()
    vocab = VocabShard.whole(3)
    rest = vocab.log_rest(vocab.log_softmax(logits), torch.tensor([[0, 1, 2], [2, 1, 0]]))
    rest.sum().backward()
    assert (rest < -80).all()
    assert rest.isfinite().all()
    assert (logits.grad == 0).all()


def sampled_over_all_tokens(behaviour, cap):
    """Expected loss and gradient over a token drawn from `behaviour` [V], with the student's and target's logits."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 6, dtype=torch.float64, generator=generator).requires_grad_()
    target = torch.log_softmax(2 * torch.randn(1, 6, dtype=torch.float64, generator=generator), -1)[0]
    student = VocabShard.whole(6).log_softmax(logits)[0]
    mu = behaviour(student.detach())
    weight, cut = losses.importance(student, mu, cap)
    loss = (mu.exp() * losses.sampled_reverse_kl(student, target, weight)).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    value, expected = oracle.grad(lambda z: oracle.kl(oracle.log_softmax(z, 6), target), logits)
    return loss.item(), gradient, cut, value.item(), expected


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sampled_tokens_give_reverse_kl_in_expectation(temperature):
    """Value and gradient, also when the sampler is another model; without truncation."""
    loss, gradient, cut, value, expected = sampled_over_all_tokens(
        lambda q: torch.log_softmax(q / temperature, -1), 1e9
    )
    assert not cut.any()
    assert loss == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-9)


def test_truncation_changes_the_tokens_above_the_cap_alone():
    student, behaviour = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -3.0, -0.5])
    weight, cut = losses.importance(student, behaviour, 2.0)
    assert weight.tolist() == pytest.approx([1.0, 2.0, math.exp(-0.5)])
    assert cut.tolist() == [False, True, False]
    *_, value, expected = sampled_over_all_tokens(lambda q: torch.log_softmax(q / 3, -1), 1e9)
    biased, gradient, cut, *_ = sampled_over_all_tokens(lambda q: torch.log_softmax(q / 3, -1), 1.1)
    assert cut.any()
    assert biased != pytest.approx(value, rel=1e-3)
    assert not torch.allclose(gradient, expected, rtol=1e-3)


def test_numbers_of_a_sampled_token():
    """log q = -1, log p = -3, w = 1.5: the student likes the token more than the teacher does, so descent lowers it."""
    student = torch.tensor([-1.0], requires_grad=True)
    loss = losses.sampled_reverse_kl(student, torch.tensor([-3.0]), torch.tensor([1.5]))
    loss.backward()
    assert (loss.item(), student.grad.item()) == (3.0, 3.0)
