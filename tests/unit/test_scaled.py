"""The output head's products in FP8 proper: those of the emulation, up to the order of sums."""

import pytest
import scaled_cases
import torch
from scaled_cases import PRODUCTS

from megatron_opd.precision.plan import Products
from megatron_opd.precision.recipes import RECIPES
from megatron_opd.precision.scaled import Scaled


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
