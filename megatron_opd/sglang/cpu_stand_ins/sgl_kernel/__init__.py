"""Stands in for SGLang's compiled kernels, of which there is no build without CUDA on the package index.

Only what the `torch_native` attention path calls. It registers no `torch.ops.sgl_kernel`, from which SGLang knows that
there are no kernels, and takes plain torch in every layer.
"""

from typing import NoReturn

import torch

__version__ = "0.0.0+stand.in"


def assign_req_to_token_pool_cpu(
    requests_B: torch.Tensor,
    slots_BS: torch.Tensor,
    start_B: torch.Tensor,
    end_B: torch.Tensor,
    free_T: torch.Tensor,
    pool_len: int,
) -> None:
    """Hand the free cache slots to the requests in order: request b gets end - start of them at [start, end)."""
    used = 0
    for request, start, end in zip(requests_B.tolist(), start_B.tolist(), end_B.tolist(), strict=True):
        slots_BS[request, start:end] = free_T[used : used + end - start].to(slots_BS.dtype)
        used += end - start


def __getattr__(name: str) -> object:
    """Speculative decoding, AMX matrix products and so on can be imported; calling them says what is wrong."""
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in without CUDA")

    return missing
