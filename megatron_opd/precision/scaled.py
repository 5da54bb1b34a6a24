"""The three products of a linear layer in FP8 proper, by torch's scaled matrix product; one scale a tensor.

    y = Q(x) Q(w)ᵀ      dx = Q(dy) Q(w)      dw = Q(dy)ᵀ Q(x)      Q: values times a scale, in FP8 (`quantize.py`)

Sums are float32. On CUDA the device multiplies FP8 (Ada, Hopper or later), a CPU does what it says. Contracted sides
are filled up with zeros to a multiple of 16, which the kernels want and which changes nothing.

Shape suffixes: T rows (tokens), L rows of the weight, D columns of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_opd.precision.plan import Products
from megatron_opd.precision.quantize import Quantized, quantize

_MULTIPLE = 16


class Scaled:
    """x · wᵀ in FP8, with FP8 gradients. For recipes whose scales are a tensor's own: tensorwise."""

    def __init__(self, products: Products) -> None:
        recipe = products.recipe
        parts = recipe.activations, recipe.weights, recipe.gradients
        assert products.backward, "the gradients are in FP8, too"
        assert not any(s.block or s.delayed for s in parts), recipe.name
        self.recipe = recipe

    def __call__(self, x_TD: torch.Tensor, w_LD: torch.Tensor) -> torch.Tensor:
        """[T, L] in float32."""
        if not x_TD.numel():
            return F.linear(x_TD, w_LD).float()
        return _Product.apply(x_TD, w_LD, self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, w_LD: torch.Tensor, how: Scaled) -> torch.Tensor:
        x, w = quantize(x_TD, how.recipe.activations), quantize(w_LD, how.recipe.weights)
        ctx.how, ctx.dtypes = how, (x_TD.dtype, w_LD.dtype)
        ctx.save_for_backward(x.values, x.scales, w.values, w.scales)
        return _multiply(x.values, w.values, x, w)

    @staticmethod
    def backward(ctx: Any, grad_TL: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x_values, x_scale, w_values, w_scale = ctx.saved_tensors
        x, w = Quantized(x_values, x_scale, None), Quantized(w_values, w_scale, None)
        grad = quantize(grad_TL, ctx.how.recipe.gradients)
        dx_TD = dw_LD = None
        if ctx.needs_input_grad[0]:
            dx_TD = _multiply(grad.values, w.values.t(), grad, w).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dw_LD = _multiply(grad.values.t(), x.values.t(), grad, x).to(ctx.dtypes[1])
        return dx_TD, dw_LD, None


def _multiply(a_MK: torch.Tensor, b_NK: torch.Tensor, a: Quantized, b: Quantized) -> torch.Tensor:
    """a · bᵀ in float32 of values with the scales of `a` and `b`."""
    return torch._scaled_mm(
        _filled(a_MK), _filled(b_NK).t(), scale_a=a.scales.reciprocal(), scale_b=b.scales.reciprocal(),
        out_dtype=torch.float32,
    )  # fmt: skip


def _filled(values_RK: torch.Tensor) -> torch.Tensor:
    """The rows one after the other in memory, their columns filled up with zeros. Padding knows no FP8, but bytes: 0 is
    the zero of both formats."""
    missing = -values_RK.shape[1] % _MULTIPLE
    if not missing:
        return values_RK.contiguous()
    return F.pad(values_RK.contiguous().view(torch.uint8), (0, missing)).view(values_RK.dtype)
