"""Numbers that fp16 does not know: above 65,504 they become infinite, and what is computed of them not a number."""

from __future__ import annotations

import torch


def check_fp16(made: torch.Tensor, original: torch.Tensor, what: str) -> None:
    """Raises ValueError, beginning with `what`, where finite numbers became infinite on their way to fp16.

    Other types pass without a look, and so do originals that were not finite: those are another problem.
    """
    if made.dtype == torch.float16 and bool(made.isinf().any() and original.isfinite().all()):
        raise ValueError(
            f"{what} has numbers above {torch.finfo(torch.float16).max:g}, which fp16 does not know; set the model's"
            " dtype (student.dtype, teachers.N.dtype) to bf16"
        )
