"""The same bits from the same seed on GPUs too: kernels and collectives that add in one order. CPUs always do.

Kernels of torch that have no such form say so in a warning and stay as they are: a run that stopped there could not
sample with the embedded engine on a GPU (its cumulative sums).
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F

_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # NVIDIA's cuBLAS manual, "Results reproducibility"
    "NCCL_ALGO": "Ring",  # else NCCL may choose another one for another size, or on another day
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine's attention
}


def enable() -> None:
    """Before the first kernel of the process. What the environment says already stays, but Transformer Engine's switch,
    without which Megatron refuses the mode."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    _without_is_an_error(False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # for finding bugs; nothing here reads such memory


def is_on() -> bool:
    """Whether it was enabled in this process."""
    return torch.are_deterministic_algorithms_enabled()


def attention(*inputs: torch.Tensor, **settings: Any) -> torch.Tensor:
    """torch's scaled_dot_product_attention of `inputs` (query, key, value), and its gradient, where an operator without
    one order is an error: so it takes its form that has one. Where that is a warning, its flash and memory-efficient
    kernels warn in their backward pass, and sum as they like, and cuDNN's, which has no such form, may be chosen."""
    try:
        _without_is_an_error(True)
        made = F.scaled_dot_product_attention(*inputs, **settings)
    finally:
        _without_is_an_error(False)
    if made.requires_grad:
        made.register_hook(lambda _: _without_is_an_error(True))
        for x in inputs:
            if x.requires_grad:
                x.register_hook(lambda _: _without_is_an_error(False))
    return made


def _without_is_an_error(value: bool) -> None:
    """Or a warning: operators that have no deterministic form."""
    torch.use_deterministic_algorithms(True, warn_only=not value)
