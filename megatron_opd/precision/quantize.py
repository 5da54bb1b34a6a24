"""Rounding to FP8 and back: a value times its scale, saturated and rounded to the nearest even by torch's own cast.

    q = cast(clamp(x · s, ±max))        s = max / amax, or the power of two below it; 1 where a block is all 0
    x' = q / s

Shape letters: R rows (all leading dimensions), C columns.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_opd.precision.recipes import HISTORY, Format, Scaling

DTYPES: dict[Format, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST = {name: torch.finfo(dtype).max for name, dtype in DTYPES.items()}
_AT_ONCE = 1 << 24
"""Values of a tensor that are rounded together."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A tensor in FP8, a byte a value, and the scales that it was multiplied by."""

    values: torch.Tensor
    scales: torch.Tensor
    """float32: one, or one a block [R / rows, C / columns], rounded up."""
    block: tuple[int, int] | None

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in `dtype`, rounded."""
        wide = self.values.float()
        if self.block is None:
            return (wide / self.scales).to(dtype)
        blocks = _blocks(wide, self.block)
        flat = (blocks / self.scales[:, None, :, None]).flatten(2).flatten(0, 1)
        return _cropped(flat, wide.shape).to(dtype)

    @property
    def num_bytes(self) -> int:
        """Memory of values and scales."""
        return self.values.numel() + self.scales.numel() * self.scales.element_size()


@torch.no_grad()
def quantize(x: torch.Tensor, scaling: Scaling, scale: torch.Tensor | None = None) -> Quantized:
    """`x` [..., C] in FP8 with scales from its own values, or with a given one for the whole tensor."""
    dtype = DTYPES[scaling.format]
    if scaling.block is None:
        scale = scale_of(x.abs().amax(), scaling) if scale is None else scale
        return Quantized(_by_rows(x, scale, dtype), scale, None)
    wide = x.float()
    blocks = _blocks(wide, scaling.block)
    scales = scale_of(blocks.abs().amax(dim=(1, 3)), scaling)
    flat = (blocks * scales[:, None, :, None]).flatten(2).flatten(0, 1)
    return Quantized(_cast(_cropped(flat, wide.shape), dtype), scales, scaling.block)


def rounded(x: torch.Tensor, scaling: Scaling, scale: torch.Tensor | None = None) -> torch.Tensor:
    """`x` as FP8 knows it, in its own dtype, without a gradient."""
    return quantize(x, scaling, scale).dequantized(x.dtype)


def scale_of(amax: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """Factors that bring the largest absolute values `amax` to the format's largest number; 1 where that is not
    possible: for zeros, and for what is not finite."""
    scale = LARGEST[scaling.format] / amax.float()
    if scaling.power_of_two:
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    # Values below 1e-36 would ask for a scale above float32's largest number.
    return torch.where((amax > 0) & scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))


class Rounding:
    """Rounds one operand of one layer, pass after pass; a delayed scale is the only thing it remembers.

    `group`: ranks that hold parts of one tensor, which then share the scale of the whole tensor.
    """

    def __init__(self, scaling: Scaling, group: dist.ProcessGroup | None = None) -> None:
        self.scaling, self.group = scaling, group
        self._seen: deque[torch.Tensor] = deque(maxlen=HISTORY)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` rounded. Collective over `group` where a scale is a whole tensor's."""
        if not x.numel() and self.group is None:  # an expert that no token went to
            return x
        if self.scaling.block is not None or (self.group is None and not self.scaling.delayed):
            return rounded(x, self.scaling)
        amax = x.detach().abs().amax().float()
        if self.group is not None:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=self.group)
        if not self.scaling.delayed:
            return rounded(x, self.scaling, scale_of(amax, self.scaling))
        # As Transformer Engine starts: with a scale of 1, before any pass has been seen.
        scale = scale_of(torch.stack(list(self._seen)).amax(), self.scaling) if self._seen else torch.ones_like(amax)
        self._seen.append(amax)
        return rounded(x, self.scaling, scale)


class RoundForward(torch.autograd.Function):
    """Rounds in the forward pass; the gradient passes as it is (straight through)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounding: Rounding) -> torch.Tensor:
        return rounding(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class RoundBackward(torch.autograd.Function):
    """Passes in the forward pass; rounds the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounding: Rounding) -> torch.Tensor:
        ctx.rounding = rounding
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.rounding(grad), None


def _cast(scaled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Saturated as the hardware does; but infinity becomes NaN, so that an overflow of the model itself stays seen."""
    largest = torch.finfo(dtype).max
    return scaled.clamp(-largest, largest).masked_fill(scaled.isinf(), torch.nan).to(dtype)


def _by_rows(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` times the scale in FP8, some rows at a time: what is in between takes many times the memory."""
    values = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    flat, into = x.reshape(-1, x.shape[-1]), values.view(-1, x.shape[-1])
    rows = max(_AT_ONCE // x.shape[-1], 1)
    for some, out in zip(flat.split(rows), into.split(rows), strict=True):
        out.copy_(_cast(some.float() * scale, dtype))
    return values


def _blocks(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[..., C] -> [R / rows, rows, C / columns, columns], filled up with zeros."""
    flat = x.reshape(-1, x.shape[-1])
    rows, columns = block
    missing = -flat.shape[0] % rows, -flat.shape[1] % columns
    flat = torch.nn.functional.pad(flat, (0, missing[1], 0, missing[0]))
    return flat.view(flat.shape[0] // rows, rows, flat.shape[1] // columns, columns)


def _cropped(flat: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return flat[: shape[:-1].numel(), : shape[-1]].reshape(shape)
