"""FP8 products proper against their emulation, on any device that torch multiplies FP8 on."""

import weakref

import torch
import torch.nn.functional as F

from megatron_opd.precision.fp8_plan import Products
from megatron_opd.precision.quantize import RoundBackward, RoundForward, Rounding
from megatron_opd.precision.recipes import RECIPES
from megatron_opd.precision.scaled import Scaled, ScaledHead

PRODUCTS = Products(RECIPES["tensorwise"], backward=True)
FORWARD = Products(RECIPES["tensorwise"], backward=False)


def operands(num_tokens, device="cpu"):
    generator = torch.Generator().manual_seed(num_tokens)
    x, w = torch.randn(num_tokens, 64, generator=generator), 0.1 * torch.randn(96, 64, generator=generator)
    grad = torch.randn(num_tokens, 96, generator=generator).pow(3)  # gradients have long tails
    return [tensor.to(device) for tensor in (x, w, grad)]


def of(multiply, x, w, grad):
    """(product, gradients of both)."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    out = multiply(x, w)
    out.backward(grad)
    return out.detach(), x.grad, w.grad


def emulated(x, w):
    recipe = PRODUCTS.recipe
    rounded = RoundForward.apply(x, Rounding(recipe.activations)), RoundForward.apply(w, Rounding(recipe.weights))
    return RoundBackward.apply(F.linear(*rounded), Rounding(recipe.gradients))


def assert_equal_to_the_order_of_sums(num_tokens, device="cpu", error=1e-6):
    """`error`: of sums in float32; a GPU's FP8 sums are less exact."""
    values = operands(num_tokens, device)
    found, expected, plain = of(Scaled(PRODUCTS), *values), of(emulated, *values), of(F.linear, *values)
    for one, other, without in zip(found, expected, plain, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert distance(one, other) <= error
        assert distance(other, without) > 1e-2, "FP8 was left out"


def teachers_logits(x, w):
    """Of rounded hidden states and rows, in float32."""
    x, w = (Rounding(scaling)(tensor.float()) for scaling, tensor in
            ((FORWARD.recipe.activations, x), (FORWARD.recipe.weights, w)))  # fmt: skip
    return x @ w.T


def assert_a_teacher_s_head_is_the_emulated_one(num_tokens, dtype, device="cpu", error=1e-6):
    """`error`: of sums in float32; what the type of the logits costs comes on top."""
    x, w, _ = (tensor.to(dtype) for tensor in operands(num_tokens, device))
    head, expected = ScaledHead(w, FORWARD), teachers_logits(x, w)
    error += torch.finfo(dtype).eps / 2
    buffer = torch.full((num_tokens + 3, len(w)), 7.0, dtype=dtype, device=device)
    into = buffer[:num_tokens]
    assert head.logits(x, into).data_ptr() == into.data_ptr()
    for found in (into, head.logits(x)):
        assert found.dtype == dtype
        assert distance(found.float(), expected) <= error
        assert distance(expected, x.float() @ w.float().T) > 1e-2, "FP8 was left out"
    assert (buffer[num_tokens:] == 7).all(), "rows that are not ours"
    assert head.is_finite()
    w[5, 3] = float("nan")
    assert not ScaledHead(w, FORWARD).is_finite()


def assert_a_teacher_s_head_takes_a_byte_a_number(device="cpu"):
    """The rows as they were are gone when nobody else has them."""
    _, w, _ = operands(8, device)
    head, before, numel = ScaledHead(w, FORWARD), weakref.ref(w), w.numel()
    del w
    assert before() is None
    assert head.num_bytes == numel + 4


def distance(one, other):
    return float((one - other).norm() / other.norm())
