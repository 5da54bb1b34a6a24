"""The loss between two vocabularies against a re-derivation in plain float64 loops."""

import itertools
import math
import random

import pytest
import torch

from megatron_opd.config import CrossTokenizerConfig
from megatron_opd.loss.crosstok.matched import Matched
from megatron_opd.loss.crosstok.uld import Spans, other_tokens, sorted_l1, uld

STUDENT_V, TEACHER_V = 9, 7
# Student ids 0..4 are teacher ids 6..2; the others have no partner.
MATCHED = Matched(torch.arange(5), torch.arange(6, 1, -1), torch.arange(5, 9), torch.arange(2))
SPANS_G4 = torch.tensor([[0, 1, 0, 1], [1, 4, 1, 2], [4, 5, 2, 5], [6, 8, 6, 9]])


def merged(logp_RV, ids_R, spans_G2, merge):
    """A model at spans of its rows; `logp_RV[r]` predicts `ids_R[r]`."""
    kept_G = spans_G2[:, 0] if merge == "first" else spans_G2[:, 1] - 1
    came_R = logp_RV.gather(-1, ids_R[:, None])[:, 0]
    return Spans(logp_RV[kept_G], other_tokens(came_R, spans_G2, kept_G), came_R[kept_G])


def rows(num, size, seed):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(num, size, generator=draw, dtype=torch.float64) * 2
    ids = torch.randint(0, size, (num,), generator=draw)
    return logits, ids


def probabilities(logits, ids, first, stop, merge):
    """P(y) of every y at a span, a plain list, by the formula in the module's head."""
    p = torch.softmax(logits, -1).tolist()
    kept = first if merge == "first" else stop - 1
    factor = math.prod(p[i][ids[i]] for i in range(first, stop) if i != kept)
    return [factor * x for x in p[kept]]


def expected(student, teacher, beta, weight, merge):
    w = len(MATCHED.teacher_M) / TEACHER_V if weight is None else weight
    found = []
    for first, stop, their_first, their_stop in SPANS_G4.tolist():
        q = probabilities(*student, first, stop, merge)
        p = probabilities(*teacher, their_first, their_stop, merge)
        q_match, p_match = [q[i] for i in range(5)], [p[6 - i] for i in range(5)]
        q_all, p_all = [*q_match, 1 - sum(q_match)], [*p_match, 1 - sum(p_match)]
        m = [beta * a + (1 - beta) * b for a, b in zip(p_all, q_all, strict=True)]

        def kl(a, b):
            return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

        if beta == 0:
            matched = kl(p_all, q_all)
        elif beta == 1:
            matched = kl(q_all, p_all)
        else:
            matched = beta * kl(p_all, m) + (1 - beta) * kl(q_all, m)
        pairs = itertools.zip_longest(sorted(q[5:], reverse=True), sorted(p[:2], reverse=True), fillvalue=0.0)
        found.append((w * matched, (1 - w) * sum(abs(a - b) for a, b in pairs)))
    return torch.tensor(found, dtype=torch.float64).T


def weighing(weight):
    """`weight` of the matched part; None: by its share."""
    return CrossTokenizerConfig(adaptive=weight is None, matched_weight=1.0 if weight is None else weight)


def both(student, teacher, merge):
    (logits, ids), (their_logits, their_ids) = student, teacher
    ours = merged(logits.log_softmax(-1), ids, SPANS_G4[:, :2], merge)
    return ours, merged(their_logits.log_softmax(-1), their_ids, SPANS_G4[:, 2:], merge)


def computed(student, teacher, beta, weight, merge):
    return torch.stack(uld(*both(student, teacher, merge), MATCHED, weighing(weight), beta=beta)[:2])


@pytest.mark.parametrize("merge", ["first", "last"])
@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("weight", [None, 1.0, 0.25])
def test_value_and_gradient(merge, beta, weight):
    student, teacher = rows(8, STUDENT_V, 1), rows(9, TEACHER_V, 2)
    value = computed(student, teacher, beta, weight, merge)
    torch.testing.assert_close(value, expected(student, teacher, beta, weight, merge), atol=1e-12, rtol=1e-12)
    logits, ids = student
    (grad,) = torch.autograd.grad(computed((logits.requires_grad_(), ids), teacher, beta, weight, merge).sum(), logits)
    at = logits.detach().clone()
    step = 1e-6
    everywhere = list(itertools.product(range(8), range(STUDENT_V)))
    for row, column in random.Random(0).sample(everywhere, 12):
        moved = [at.clone(), at.clone()]
        moved[0][row, column] += step
        moved[1][row, column] -= step
        up, down = (expected((x, ids), teacher, beta, weight, merge).sum() for x in moved)
        assert abs((up - down) / (2 * step) - grad[row, column]) < 1e-7


@pytest.mark.parametrize("is_hybrid", [True, False])
@pytest.mark.parametrize("merge", ["first", "last"])
def test_the_reverse_kl_is_over_the_matched_tokens_and_the_rest(merge, is_hybrid):
    """Also where the loss knows no matched tokens; and it has no gradient."""
    (logits, ids), teacher = rows(8, STUDENT_V, 1), rows(9, TEACHER_V, 2)
    ours, theirs = both((logits.requires_grad_(), ids), teacher, merge)
    matched_G, _, kl_G = uld(ours, theirs, MATCHED, CrossTokenizerConfig(hybrid=is_hybrid), beta=0.3)
    torch.testing.assert_close(kl_G, expected((logits.detach(), ids), teacher, 1, 1.0, merge)[0])
    assert not kl_G.requires_grad
    assert (matched_G != 0).all() == is_hybrid


def test_plain_uld_compares_all_tokens_sorted():
    ours, theirs = both(rows(8, STUDENT_V, 1), rows(9, TEACHER_V, 2), "first")
    _, unmatched_G, _ = uld(ours, theirs, MATCHED, CrossTokenizerConfig(hybrid=False), beta=0.3)
    p = [x.logp_GV.exp() * x.others_G.exp()[:, None] for x in (ours, theirs)]
    torch.testing.assert_close(unmatched_G, sorted_l1(*p))


def test_tokens_outside_spans_have_no_gradient():
    (logits, ids), teacher = rows(8, STUDENT_V, 1), rows(9, TEACHER_V, 2)
    loss = computed((logits.requires_grad_(), ids), teacher, 1, None, "first").sum()
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad[5].abs().max() == 0
    assert grad[:5].abs().amax(-1).min() > 0


@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("merge", ["first", "last"])
def test_the_same_model_and_cut_has_no_loss_and_no_gradient(beta, merge):
    logits, ids = rows(8, STUDENT_V, 3)
    spans = torch.tensor([[0, 1], [1, 4], [4, 6], [6, 8]])
    same = Matched(torch.arange(6), torch.arange(6), torch.arange(6, 9), torch.arange(6, 9))
    ours = merged(logits.requires_grad_().log_softmax(-1), ids, spans, merge)
    theirs = merged(logits.detach().log_softmax(-1), ids, spans, merge)
    matched_G, unmatched_G, _ = uld(ours, theirs, same, weighing(0.5), beta=beta)
    assert matched_G.abs().max() < 1e-14
    assert unmatched_G.abs().max() < 1e-14
    (grad,) = torch.autograd.grad(matched_G.sum(), logits)
    assert grad.abs().max() < 1e-14


def test_the_matched_part_is_never_negative():
    for seed in range(50):
        student, teacher = rows(8, STUDENT_V, seed), rows(9, TEACHER_V, seed + 100)
        for beta in (0, 0.1, 0.9, 1):
            assert computed(student, teacher, beta, None, "first")[0].min() >= 0


def test_nothing_unmatched_and_nothing_matched():
    logp = torch.randn(2, 4, dtype=torch.float64).log_softmax(-1)
    whole = Matched(torch.arange(4), torch.arange(4), torch.arange(0), torch.arange(0))
    none = torch.zeros(2, dtype=torch.float64)
    at_once = Spans(logp, none, none)
    other = Spans(torch.randn(2, 4, dtype=torch.float64).log_softmax(-1), none, none)
    matched_G, unmatched_G, _ = uld(other, at_once, whole, weighing(None), beta=0)
    kl_G = (logp.exp() * (logp - other.logp_GV)).sum(-1)
    torch.testing.assert_close(matched_G, kl_G, atol=1e-12, rtol=0)
    assert unmatched_G.tolist() == [0, 0]
    nothing = Matched(torch.arange(0), torch.arange(0), torch.arange(4), torch.arange(4))
    matched_G, unmatched_G, _ = uld(other, at_once, nothing, weighing(None), beta=0)
    assert matched_G.abs().max() == 0
    torch.testing.assert_close(unmatched_G, sorted_l1(other.logp_GV.exp(), logp.exp()))


def test_a_tiny_rest_keeps_its_digits():
    logits = torch.tensor([[0.0, -40.0]])
    spans = Spans(logits.log_softmax(-1), torch.tensor([0.0]), logits[:, 0])
    assert spans.with_rest(torch.tensor([0]), torch.tensor([1]))[0, 1].item() == pytest.approx(-40, abs=1e-4)
    long = Spans(logits.log_softmax(-1), torch.tensor([-1e-7]), logits[:, 0])
    assert long.with_rest(torch.tensor([0]), torch.tensor([1]))[0, 1].item() == pytest.approx(math.log(1e-7), abs=1e-4)
