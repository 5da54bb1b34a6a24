"""Values that overflow fp16: above 65,504 they become infinite, and results computed from them NaN."""

from __future__ import annotations

import torch


def check_fp16(made: torch.Tensor, original: torch.Tensor, what: str) -> None:
    """Raises ValueError, beginning with `what`, where finite numbers became infinite on their way to fp16.

    Other types pass without a look, and so do originals that were not finite: those are another problem.
    """
    if made.dtype == torch.float16 and bool(made.isinf().any() and original.isfinite().all()):
        raise ValueError(
            f"{what} has values above {torch.finfo(torch.float16).max:g}, which overflow fp16; set the model's"
            " dtype (student.dtype, teachers.N.dtype) to bf16"
        )
