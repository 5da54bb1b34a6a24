"""Listed ids and the rest: what merging outcomes may and may not do to a divergence, and lists that are not tidy."""

from itertools import pairwise

import oracle
import pytest
import torch

from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss import divergence
from megatron_opd.loss.listed_ids import REST_FLOOR, Outcomes, merged

SIZE, NUM_TOKENS = 30, 40
VOCAB = VocabShard.whole(SIZE)
ALWAYS = torch.ones(NUM_TOKENS, dtype=torch.bool)
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def logp(seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(scale * torch.randn(NUM_TOKENS, SIZE, dtype=torch.float64, generator=generator), -1)


def random_ids(k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(SIZE, generator=generator)[:k] for _ in range(NUM_TOKENS)])


def over_list(student, teacher, ids):
    """(student, target, their space) as a teacher's list shows them."""
    outcomes = Outcomes.union([(ids, ALWAYS)], VOCAB)
    told = outcomes.of_list(ids, teacher.gather(-1, ids))
    return outcomes.of_exact(student), outcomes.normalised(told), outcomes.space


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [1, 2, 5, 15, 29, 30])
@pytest.mark.parametrize("likeliest", [True, False], ids=["top", "any"])
def test_a_divergence_over_a_list_is_a_lower_bound(beta, k, likeliest):
    """Data-processing inequality; equal where everything is listed, and seldom elsewhere."""
    student, teacher = logp(1), logp(2)
    ids = teacher.topk(k).indices if likeliest else random_ids(k)
    bound = divergence(*over_list(student, teacher, ids), beta)
    full = oracle.divergence(student, teacher, beta)
    slack = full - bound
    if k == SIZE:
        torch.testing.assert_close(bound, full, atol=1e-9, rtol=0)
    else:
        assert slack.min() > -2 * REST_FLOOR
    if k <= 15:
        assert slack.mean() > 1e-3


@pytest.mark.parametrize("beta", BETAS)
def test_a_longer_list_is_a_tighter_bound(beta):
    student, teacher = logp(3), logp(4)
    bounds = [
        divergence(*over_list(student, teacher, teacher.topk(k).indices), beta).mean() for k in (1, 3, 8, 16, 25, SIZE)
    ]
    assert all(a < b for a, b in pairwise(bounds))


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_through_a_list_of_everything_is_the_full_one(beta):
    student, teacher = logp(5).requires_grad_(), logp(6)
    mine, target, space = over_list(VOCAB.log_softmax(student), teacher, random_ids(SIZE))
    (found,) = torch.autograd.grad(divergence(mine, target, space, beta).sum(), student)
    _, expected = oracle.grad(lambda z: oracle.divergence(oracle.log_softmax(z, SIZE), teacher, beta), student)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-7)


def test_the_rest_keeps_its_digits_where_one_minus_the_sum_has_none():
    """In fp32: a student that puts 1e-12 outside of the list, next to 1 - 1e-12 on it."""
    logits = torch.zeros(1, SIZE)
    logits[0, 0] = 31.0
    ids = torch.zeros(1, 1, dtype=torch.long)
    found = Outcomes.union([(ids, ALWAYS[:1])], VOCAB).of_exact(VOCAB.log_softmax(logits))
    exact = oracle.log_softmax(logits, SIZE)[0, 1:].exp().sum().log()
    assert exact.exp() < 1.1e-12
    assert found[0, -1].item() == pytest.approx(exact.item(), abs=4e-6)


def test_a_teacher_that_seems_to_have_nothing_left_has_the_floor():
    """Rounding may even leave less than nothing."""
    for over in (0.0, 1e-6):
        ids = torch.tensor([[3, 7]])
        outcomes = Outcomes.union([(ids, ALWAYS[:1])], VOCAB)
        told = outcomes.of_list(ids, torch.tensor([[0.5 + over, 0.5]]).log())
        assert told[0, -1].exp().item() == pytest.approx(REST_FLOOR, rel=1e-5)
        assert outcomes.normalised(told).exp().sum().item() == pytest.approx(1.0, abs=1e-6)


def test_duplicates_and_fillers_count_for_nothing():
    teacher, student = logp(7), logp(8)
    tidy = random_ids(4)
    untidy = torch.cat([tidy, tidy[:, :2], torch.full_like(tidy[:, :1], -1), torch.full_like(tidy[:, :1], SIZE)], -1)
    values = torch.cat([teacher.gather(-1, tidy), torch.zeros(NUM_TOKENS, 4, dtype=torch.float64)], -1)
    outcomes = Outcomes.union([(untidy, ALWAYS)], VOCAB)
    assert (outcomes.exist().sum(-1) == 5).all()
    told = outcomes.normalised(outcomes.of_list(untidy, values))
    for beta in BETAS:
        found = divergence(outcomes.of_exact(student), told, outcomes.space, beta)
        torch.testing.assert_close(found, divergence(*over_list(student, teacher, tidy), beta))


def test_a_union_has_each_id_once_and_only_from_teachers_that_were_asked():
    ids = [torch.tensor([[4, 2], [4, 2], [4, 2]]), torch.tensor([[2, 9, 5], [2, 9, 5], [2, 9, 5]])]
    asked = [torch.tensor([True, True, False]), torch.tensor([True, False, False])]
    outcomes = Outcomes.union(list(zip(ids, asked, strict=True)), VOCAB)
    assert [[i for i in row if i < SIZE] for row in outcomes.ids_TU.tolist()] == [[2, 4, 5, 9], [2, 4], []]
    assert outcomes.exist()[:, -1].all()  # something is left at every token, at the last one everything
    told = outcomes.of_list(ids[0], torch.tensor([[0.3, 0.2]] * 3).log())
    listed = {int(i): x for i, x in zip(outcomes.ids_TU[0], told[0, :-1].exp().tolist(), strict=True)}
    assert {i: round(x, 6) for i, x in listed.items()} == {2: 0.2, 4: 0.3, 5: 0.0, 9: 0.0, SIZE: 0.0}
    assert told[0, -1].exp().item() == pytest.approx(0.5)  # with what it did not list


def test_lists_that_cover_the_vocabulary_only_together():
    """Nothing is left for the rest, so what each teacher holds outside of its own list is left out."""
    student, teacher = logp(9), logp(10)
    halves = [torch.arange(0, 18).expand(NUM_TOKENS, -1), torch.arange(12, SIZE).expand(NUM_TOKENS, -1)]
    outcomes = Outcomes.union([(ids, ALWAYS) for ids in halves], VOCAB)
    told = [outcomes.of_list(ids, teacher.gather(-1, ids)) for ids in halves]
    target = outcomes.normalised(torch.stack(told).logsumexp(0))
    assert (target[:, -1].exp() == 0).all()
    torch.testing.assert_close(target.exp().sum(-1), torch.ones(NUM_TOKENS, dtype=torch.float64))
    for beta in BETAS:
        assert divergence(outcomes.of_exact(student), target, outcomes.space, beta).isfinite().all()


def test_merging_what_another_did_not_list():
    """The student on a union, seen through one teacher's own list, is the student on that list."""
    student, teacher = logp(11), logp(12)
    mine, others = random_ids(4, seed=1), random_ids(6, seed=2)
    union = Outcomes.union([(mine, ALWAYS), (others, ALWAYS)], VOCAB)
    own = union.of_list(mine, teacher.gather(-1, mine))
    found = merged(union.of_exact(student), own)
    for beta in BETAS:
        expected = divergence(*over_list(student, teacher, mine), beta)
        torch.testing.assert_close(divergence(found, own, union.space, beta), expected, atol=1e-5, rtol=0)
