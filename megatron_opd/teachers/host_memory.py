"""Tensors in one piece of host memory that copies to a GPU can be made from while it computes.

torch's own pinned memory is rounded up to a power of two, a tensor at a time: 12 % more for a 70B teacher on eight
GPUs, and up to twice as much for other shapes. So this is ordinary memory of the size that is needed, pinned where it
is.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

_ALIGNMENT = 256
"""Bytes: of every type that a tensor can have, and what copies like best."""
_FOR_ALL_DEVICES = 1  # cudaHostRegisterPortable


def layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """(where each of so many bytes begins, the bytes of all together)."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return starts, end


def copies(tensors: Sequence[torch.Tensor], *, pin: bool) -> list[torch.Tensor]:
    """The tensors in host memory, each in its own type and shape. `pin`: for copies by CUDA while it computes.

    Raises RuntimeError where the memory cannot be pinned. It stays while one of the copies is there.
    """
    starts, total = layout([tensor.nbytes for tensor in tensors])
    memory = torch.empty(total, dtype=torch.uint8, device="cpu")
    if pin and total:
        _pin(memory)
    made = []
    for tensor, start in zip(tensors, starts, strict=True):
        part = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        made.append(part.copy_(tensor.detach()))
    return made


def _pin(memory: torch.Tensor) -> None:
    cuda = torch.cuda.cudart()
    error = int(cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, _FOR_ALL_DEVICES))
    if error:
        raise RuntimeError(
            f"{memory.nbytes / 1e9:.1f} GB of host memory for the weights of a teacher could not be pinned (CUDA's"
            f" error {error}); allow more locked memory (ulimit -l), or set teachers.N.offload=false"
        )
    # The storage, which all copies share, goes when the last of them does.
    weakref.finalize(memory.untyped_storage(), cuda.cudaHostUnregister, memory.data_ptr()).atexit = False
