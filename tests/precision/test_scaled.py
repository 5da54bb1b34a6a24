"""Output heads' products in FP8 proper: those of the emulation, up to the order of sums."""

import pytest
import scaled_cases
import torch
from scaled_cases import FORWARD, PRODUCTS

from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.fused import FactoredLogits, LossSpec, Problem, run
from megatron_opd.loss.fused.reference import Reference
from megatron_opd.precision import scaled
from megatron_opd.precision.fp8_plan import Products
from megatron_opd.precision.quantize import quantize
from megatron_opd.precision.recipes import RECIPES
from megatron_opd.precision.scaled import Scaled, ScaledHead


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 50])
def test_all_three_products_are_the_emulation_s(num_tokens):
    """Also where the number of tokens is none that the kernels take."""
    scaled_cases.assert_equal_to_the_order_of_sums(num_tokens)


def test_bfloat16_models():
    x, w, grad = scaled_cases.operands(24)
    out, dx, dw = scaled_cases.of(Scaled(PRODUCTS), x.bfloat16(), w.bfloat16(), grad)
    assert (out.dtype, dx.dtype, dw.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    expected = scaled_cases.of(scaled_cases.emulated, x.bfloat16().float(), w.bfloat16().float(), grad)
    for found, wanted in zip((out, dx, dw), expected, strict=True):
        assert scaled_cases.distance(found.float(), wanted) <= 4e-3


def test_a_head_that_does_not_learn_has_no_gradient():
    x, w, grad = scaled_cases.operands(8)
    x.requires_grad_()
    Scaled(PRODUCTS)(x, w).backward(grad)
    assert x.grad is not None
    assert w.grad is None


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_teacher_s_logits_are_the_emulation_s(num_tokens, dtype):
    scaled_cases.assert_a_teacher_s_head_is_the_emulated_one(num_tokens, dtype)


def test_a_teacher_s_head_takes_a_byte_a_number():
    scaled_cases.assert_a_teacher_s_head_takes_a_byte_a_number()


def test_a_teacher_s_rows_are_rounded_once_and_hidden_states_a_chunk_at_a_time(monkeypatch):
    """Chunks have scales of their own: small hidden states are not lost beside large ones elsewhere."""
    seen = []

    def noted(x, *args):
        seen.append(tuple(x.shape))
        return quantize(x, *args)

    monkeypatch.setattr(scaled, "quantize", noted)
    x, w, _ = scaled_cases.operands(24)
    x[:8] *= 1e-6  # under one scale for all they would be 0
    head = ScaledHead(w, FORWARD)
    parts = [head.logits(part) for part in x.split(8)]
    assert seen == [(96, 64), (8, 64), (8, 64), (8, 64)]
    for part, found in zip(x.split(8), parts, strict=True):
        assert scaled_cases.distance(found, part @ w.T) < 0.05
    assert scaled_cases.distance(head.logits(x)[:8], x[:8] @ w.T) > 0.05


def test_shards_of_a_teacher_s_head_have_scales_of_their_own():
    """What they give is in the same numbers all the same, and rows of zeros, as padding has them, give 0."""
    x, w, _ = scaled_cases.operands(8)
    w[:48] *= 1e-6
    w[80:] = 0
    together = torch.cat([ScaledHead(shard, FORWARD).logits(x) for shard in w.split([48, 32, 16])], dim=1)
    assert (together[:, 80:] == 0).all()
    for columns in (slice(0, 48), slice(48, 80)):
        assert scaled_cases.distance(together[:, columns], x @ w[columns].T) < 0.05
    assert scaled_cases.distance(ScaledHead(w, FORWARD).logits(x)[:, :48], x @ w[:48].T) > 0.05


@pytest.mark.parametrize("ensemble", ["logits", "probs"])
@pytest.mark.parametrize("by_teacher", [False, True])
def test_the_fused_loss_of_heads_in_fp8_is_that_of_their_logits(ensemble, by_teacher):
    """Also where products of plain heads would be added up, and in the last chunk, which is smaller."""
    num_tokens, chunk = 40, 16
    states = [scaled_cases.operands(num_tokens + n)[0][:num_tokens] for n in range(3)]
    student, *rows = (scaled_cases.operands(n)[1] for n in range(3))
    rows[1] = torch.cat([rows[1][:80], torch.zeros(16, 64)])
    heads = [ScaledHead(w, FORWARD) for w in rows]
    logits = [
        torch.cat([head.logits(part) for part in h.split(chunk)]) for h, head in zip(states[1:], heads, strict=True)
    ]

    def loss(of_student, *teachers):
        problem = Problem(
            student=of_student,
            teachers=teachers,
            weights_RN=torch.tensor([[0.25, 0.75]]).repeat(num_tokens, 1),
            asked=LossSpec(0.5, 1.0, ensemble, 2, by_teacher=by_teacher),
            vocab=VocabShard(0, 96, 90),
            backend=Reference(),
            chunk_tokens=chunk,
        )
        return run(problem).outcome.loss_R

    found = loss(
        FactoredLogits(states[0], student),
        *(FactoredLogits(h, head) for h, head in zip(states[1:], heads, strict=True)),
    )
    torch.testing.assert_close(found, loss(states[0] @ student.T, *logits), rtol=1e-5, atol=1e-6)
    plain = loss(
        FactoredLogits(states[0], student), *(FactoredLogits(h, w) for h, w in zip(states[1:], rows, strict=True))
    )
    assert (found - plain).abs().mean() > 1e-4, "FP8 was left out"


def test_a_teacher_that_is_asked_about_nothing():
    x, w, _ = scaled_cases.operands(8)
    assert ScaledHead(w, FORWARD).logits(x[:0]).shape == (0, 96)


def test_hidden_states_that_are_not_finite_are_seen():
    x, w, _ = scaled_cases.operands(8)
    x[3, 1] = float("inf")
    logits = ScaledHead(w, FORWARD).logits(x)
    assert not logits[3].isfinite().any()
    assert logits[4].isfinite().all()


def test_no_tokens():
    x, w, _ = scaled_cases.operands(8)
    x = x[:0].requires_grad_()
    out = Scaled(PRODUCTS)(x, w)
    assert out.shape == (0, 96)
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_what_is_not_finite_is_seen():
    x, w, _ = scaled_cases.operands(8)
    x[3, 1] = float("inf")
    assert not Scaled(PRODUCTS)(x, w)[3].isfinite().any()


@pytest.mark.parametrize("recipe", ["delayed", "blockwise", "mxfp8"])
def test_other_recipes_are_not_taken(recipe):
    with pytest.raises(AssertionError, match=recipe):
        Scaled(Products(RECIPES[recipe], backward=True))
    with pytest.raises(AssertionError, match=recipe):
        ScaledHead(torch.ones(16, 16), Products(RECIPES[recipe], backward=False))
