"""Wrong arguments and wrong logits: said clearly, before or instead of a wrong number."""

import pytest
import torch

from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss import NonFiniteLogits, distillation_loss, linear_distillation_loss
from megatron_opd.loss.fused import backends, native

T, V, D = 4, 30, 8


def z(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


S, P = z(T, V), [z(T, V, seed=1), z(T, V, seed=2)]
H, W, Q = z(T, D), z(V, D), [(z(T, D + 1), z(V, D + 1))]

WRONG = {
    "tokens": (P[:1], {}, {"student": z(T + 1, V)}, "teacher 0 has 4 tokens, but the student 5"),
    "no teacher": ([], {}, {}, "at least one"),
    "vocabularies": ([z(T, V + 2)], {}, {}, "vocabularies differ .student: 30, teacher 0: 32."),
    "columns": ([z(T, 10)], {"vocab": VocabShard(0, V, 20)}, {}, "teacher 0 has 10 columns, but 20"),
    "shard": (P, {"vocab": VocabShard(0, 99, 99)}, {}, "columns 0 to 99, but the student has 30"),
    "type": ([P[0].long()], {}, {}, "must be floating-point, not torch.int64"),
    "device": ([P[0].to("meta")], {}, {}, "is on meta, but the student on cpu"),
    "rank": (P, {}, {"student": z(V)}, "need tokens and columns"),
    "no rows": ([z(0, V)], {}, {"student": z(0, V)}, "must be a matrix with rows and columns"),
    "empty mask": (P, {"mask": torch.zeros(T)}, {}, "no token counts"),
    "mask": (P, {"mask": torch.ones(T + 1)}, {}, "mask has shape .5,., but there are 4 tokens"),
    "weights shape": (P, {"weights": [1.0]}, {}, "2 numbers, or that many for each of 4"),
    "negative": (P, {"weights": [2.0, -1.0]}, {}, "weights of token 0 are .2.0, -1.0."),
    "all zero": (P, {"weights": torch.tensor([[1.0, 0], [1, 1], [0, 0], [0, 0]])}, {}, "weights of token 2"),
    "nan weight": (P, {"weights": [float("nan"), 1.0]}, {}, "must be finite"),
    "beta": (P, {"beta": 1.5}, {}, "beta must lie between 0"),
    "temperature": (P, {"temperature": 0.0}, {}, "temperature must be above 0"),
    "ensemble": (P, {"ensemble": "mean"}, {}, "ensemble must be 'logits' or 'probs'"),
    "reduction": (P, {"reduction": "sum"}, {}, "reduction must be"),
    "nonfinite": (P, {"on_nonfinite": "skip"}, {}, "on_nonfinite must be"),
    "backend": (P, {"backend": "cuda"}, {}, "backend must be one of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    teachers, settings, student, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        distillation_loss(student.get("student", S.clone()), teachers, **settings)


def test_unknown_setting():
    with pytest.raises(TypeError, match="there is no setting betta"):
        distillation_loss(S, P, betta=1.0)


def test_wrong_hidden_states():
    with pytest.raises(ValueError, match="hidden states of student have 8 numbers, but its head 9"):
        linear_distillation_loss(H, z(V, D + 1), Q)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 on cpu"):
        linear_distillation_loss(H, W.bfloat16(), Q)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_logits_that_are_not_finite(value, where, beta, backend):
    """The position is that among all tokens, also behind a mask; a caller may have NaN in place of the error."""
    student, teacher = S.clone(), P[0].clone()
    (student if where == "student" else teacher)[2, 17] = value
    settings = {"beta": beta, "backend": backend}
    with pytest.raises(NonFiniteLogits, match="at token 2") as caught:
        distillation_loss(student.clone(), [teacher], mask=torch.tensor([0, 1, 1, 1]), **settings)
    assert caught.value.tokens == [2]
    assert distillation_loss(student.clone(), [teacher], on_nonfinite="nan", **settings).isnan()
    by_token = distillation_loss(student, [teacher], on_nonfinite="nan", reduction="none", **settings)
    assert by_token.isnan().tolist() == [False, False, True, False]
    if where == "teacher":  # which does not matter where it has no weight
        assert distillation_loss(S.clone(), [teacher, P[1]], weights=[0.0, 1.0], **settings).isfinite()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_of_several_teachers_is_not_finite(value):
    wrong = P[0].clone()
    wrong[1, 3] = value
    for ensemble in ("logits", "probs"):
        with pytest.raises(NonFiniteLogits, match="token 1"):
            distillation_loss(S.clone(), [wrong, P[1]], ensemble=ensemble)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_one_of_several_teachers_rules_a_token_out(beta, backend):
    without = P[0].clone()
    without[1, 3] = -float("inf")
    settings = {"beta": beta, "ensemble": "probs", "backend": backend}
    assert distillation_loss(S.clone(), [without, P[1]], **settings).isfinite()
    with pytest.raises(NonFiniteLogits, match="token 1"):  # which the student may not
        distillation_loss(without.clone(), P, **settings)


def test_overwritten_logits_cannot_be_used_by_mistake():
    leaf = S.clone().requires_grad_()
    logits = leaf.exp()  # which keeps its result for the backward pass
    loss = distillation_loss(logits, P)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = leaf.exp()
    distillation_loss(logits, P, keep_logits=True).backward()
    assert torch.equal(logits, leaf.exp())
    expected = leaf.grad

    leaf.grad = None
    loss = distillation_loss(leaf, P)  # a leaf is never overwritten
    assert torch.equal(leaf.detach(), S)
    loss.backward(retain_graph=True)
    assert expected is not None
    with pytest.raises(RuntimeError, match="gave its gradient away"):
        loss.backward()


def test_without_gradients_nothing_is_overwritten():
    with torch.no_grad():
        logits = S.clone()
        distillation_loss(logits, P)
    assert torch.equal(logits, S)


def test_upstream_factor_scales_the_gradient():
    grads = []
    for factor in (1.0, -2.5):
        leaf, h, w = S.clone().requires_grad_(), H.clone().requires_grad_(), W.clone().requires_grad_()
        (factor * (distillation_loss(leaf * 1, P) + linear_distillation_loss(h, w, Q))).backward()
        grads.append((leaf.grad, h.grad, w.grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(-2.5 * one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad(dtype):
    """The head's gradient is added to it in the forward pass, in float32, and autograd gets none."""
    h, pairs = H.clone().to(dtype).requires_grad_(), [(x.to(dtype), w.to(dtype)) for x, w in Q]
    plain = W.clone().to(dtype).requires_grad_()
    linear_distillation_loss(h, plain, pairs).backward()
    hidden, h.grad = h.grad, None
    head = W.clone().to(dtype).requires_grad_()
    head.main_grad = torch.ones(V, D)
    for n in range(2):  # micro-batches
        (3.0 * linear_distillation_loss(h, head, pairs, upstream=3.0, chunk_tokens=1 + n)).backward()
    assert head.grad is None
    error = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(head.main_grad - 1, 6 * plain.grad.float(), rtol=error, atol=error)
    torch.testing.assert_close(h.grad, 6 * hidden, rtol=error, atol=error)
    loss = linear_distillation_loss(h, head, pairs)
    with pytest.raises(RuntimeError, match="for another upstream factor"):
        (2 * loss).backward()


def test_frozen_head():
    h = H.clone().requires_grad_()
    linear_distillation_loss(h, W, Q).backward()
    assert h.grad.abs().sum() > 0


def test_without_a_compiler_the_reference_works(monkeypatch, tmp_path):
    """One warning that says what is missing, and the same numbers."""
    expected = distillation_loss(S.clone(), P)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("MEGATRON_OPD_CACHE", str(tmp_path))
    native.found.cache_clear()
    backends._warn_once.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no C.. compiler 'no-such-compiler'") as said:
            found = [distillation_loss(S.clone(), P) for _ in range(2)]
        assert len(said) == 1
    finally:
        monkeypatch.undo()
        native.found.cache_clear()
    torch.testing.assert_close(found[0], expected)
