"""Which code does the rows' work: Triton kernels on CUDA, compiled C++ on a CPU, plain PyTorch where neither fits.

All of them give the same numbers up to rounding, and the same tests hold all of them to the formulas.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable

import torch

from megatron_opd.loss.fused import native
from megatron_opd.loss.fused.reference import Reference

NAMES = ("auto", "torch", "native", "triton")


def choose(tensors: Iterable[torch.Tensor], name: str = "auto") -> Reference:
    """The backend for logits like these. By a name other than auto: that one, or ValueError where it cannot be had."""
    tensors = list(tensors)
    device, dtypes = tensors[0].device, {x.dtype for x in tensors}
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, not '{name}'")
    if name == "torch":
        return Reference()
    narrow = dtypes <= {torch.float32, torch.bfloat16}
    for_triton = dtypes <= {torch.float32, torch.bfloat16, torch.float16}
    if name == "native" or (name == "auto" and device.type == "cpu" and narrow):
        library = native.library() if device.type == "cpu" and narrow else None
        if library is not None:
            return native.Native(library)
    elif name == "triton" or (device.type == "cuda" and for_triton):
        made = _triton() if for_triton else None
        if made is not None:
            return made
    if name != "auto":
        types = ", ".join(sorted(str(d) for d in dtypes))
        raise ValueError(f"backend '{name}' cannot be had for {types} on {device}; use backend='auto'")
    return Reference()


@functools.cache
def _triton() -> Reference | None:
    """The Triton kernels, or None after a warning that they are not there."""
    try:
        from megatron_opd.loss.fused.triton_rows import TritonRows
    except ImportError as error:
        warnings.warn(f"the loss runs without its Triton kernels, several times slower: {error}", stacklevel=2)
        return None
    return TritonRows()
