"""FP8 products proper against their emulation, on any device that torch multiplies FP8 on."""

import torch
import torch.nn.functional as F

from megatron_opd.precision.plan import Products
from megatron_opd.precision.quantize import RoundBackward, RoundForward, Rounding
from megatron_opd.precision.recipes import RECIPES
from megatron_opd.precision.scaled import Scaled

PRODUCTS = Products(RECIPES["tensorwise"], backward=True)


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


def distance(one, other):
    return float((one - other).norm() / other.norm())
