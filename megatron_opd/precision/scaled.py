"""Output heads in FP8 proper, by torch's scaled matrix product, one scale a tensor: the student's three products, and a
teacher's one.

    y = Q(x) Q(w)ᵀ      dx = Q(dy) Q(w)      dw = Q(dy)ᵀ Q(x)      Q: values times a scale, in FP8 (`quantize.py`)

Sums are float32. On CUDA the device multiplies FP8 (Ada, Hopper or later), a CPU does what it says. Contracted sides
are filled up with zeros to a multiple of 16, which the kernels want and which changes nothing.

Shape suffixes: T rows (tokens), L rows of the weight, D columns of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_opd.precision.fp8_plan import Products
from megatron_opd.precision.quantize import Quantized, quantize
from megatron_opd.precision.recipes import Recipe

_MULTIPLE = 16


class Scaled:
    """x · wᵀ in FP8, with FP8 gradients. For recipes whose scales are a tensor's own: tensorwise."""

    def __init__(self, products: Products) -> None:
        assert products.backward, "the gradients are in FP8, too"
        self.recipe = _of_tensors(products)

    def __call__(self, x_TD: torch.Tensor, w_LD: torch.Tensor) -> torch.Tensor:
        """[T, L] in float32."""
        if not x_TD.numel():
            return F.linear(x_TD, w_LD).float()
        return _Product.apply(x_TD, w_LD, self)


class ScaledHead:
    """A teacher's output head [L, D] in FP8, a `types.OwnHead`: rows that never change are rounded once, hidden states
    with every chunk of tokens.

    The rows of a vocabulary shard have a scale of their own, which its logits are divided by before anything is
    exchanged. So shards need not agree on one, and each is at least as fine as the whole head's would be.
    """

    def __init__(self, head_LD: torch.Tensor, products: Products) -> None:
        assert not products.backward, "a teacher learns nothing"
        self.shape, self.dtype, self.device = head_LD.shape, head_LD.dtype, head_LD.device
        self._recipe = _of_tensors(products)
        rows = quantize(head_LD, self._recipe.weights)
        self._rows = Quantized(_filled(rows.values), rows.scales, None)

    def logits(self, hidden_CD: torch.Tensor, out_CL: torch.Tensor | None = None) -> torch.Tensor:
        """h Wᵀ in the type of `out_CL`, and into it, or in the teacher's."""
        if not len(hidden_CD):
            return hidden_CD.new_empty(0, self.shape[0]) if out_CL is None else out_CL
        x = quantize(hidden_CD, self._recipe.activations)
        return _multiply(x.values, self._rows.values, x, self._rows, out=out_CL, dtype=self.dtype)

    def is_finite(self) -> bool:
        """Whether the rows are: rounding has made NaN of all that was not, in e4m3 all bits but the sign."""
        assert self._rows.values.dtype == torch.float8_e4m3fn
        return not bool((self._rows.values.view(torch.uint8) & 0x7F == 0x7F).any())

    @property
    def num_bytes(self) -> int:
        """Memory that stays."""
        return self._rows.num_bytes


def _of_tensors(products: Products) -> Recipe:
    """The recipe, whose scales are a tensor's own."""
    recipe = products.recipe
    assert not any(s.block or s.delayed for s in (recipe.activations, recipe.weights, recipe.gradients)), recipe.name
    return recipe


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


def _multiply(
    a_MK: torch.Tensor,
    b_NK: torch.Tensor,
    a: Quantized,
    b: Quantized,
    *,
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """a · bᵀ of values with the scales of `a` and `b`, summed in float32: in `dtype`, or into `out` in its own."""
    scales = {"scale_a": a.scales.reciprocal(), "scale_b": b.scales.reciprocal()}
    if out is None:
        return torch._scaled_mm(_filled(a_MK), _filled(b_NK).t(), **scales, out_dtype=dtype)
    return torch._scaled_mm(_filled(a_MK), _filled(b_NK).t(), **scales, out_dtype=out.dtype, out=out)


def _filled(values_RK: torch.Tensor) -> torch.Tensor:
    """The rows one after the other in memory, their columns filled up with zeros. Padding knows no FP8, but bytes: 0 is
    the zero of both formats."""
    missing = -values_RK.shape[1] % _MULTIPLE
    if not missing:
        return values_RK.contiguous()
    return F.pad(values_RK.contiguous().view(torch.uint8), (0, missing)).view(values_RK.dtype)
