"""The backends, and the choice of one: the first that supports the case and works on this machine.

    triton    Triton kernels on CUDA         native    compiled C++ on a CPU
    torch     the same algorithm in plain PyTorch, for any device and type
    readable  the formulas, differentiated by autograd: any divergence

All of them give the same numbers up to rounding, and the same tests hold all of them to the formulas.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_opd.loss.fused import native
from megatron_opd.loss.fused.backend import Backend, Wanted
from megatron_opd.loss.fused.readable import Readable
from megatron_opd.loss.fused.reference import Reference
from megatron_opd.loss.fused.statistics import LossSpec


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A backend that is not made yet."""

    first_choice_on: tuple[str, ...] | None
    """Device types; None: any. By its name it can be had wherever it supports what is wanted."""
    find: Callable[[Wanted], Backend | None]
    """None where it does not support what is wanted, or, after a warning, where this machine lacks what it takes."""


def choose(tensors: Sequence[torch.Tensor], name: str = "auto", spec: LossSpec | None = None) -> Backend:
    """The backend for models' logits or hidden states like these. By a name other than auto: that one, or ValueError
    where it cannot be had. `spec` None: the default divergence."""
    wanted = Wanted(
        spec or LossSpec(1.0, 1.0, "logits", 1), tensors[0].device.type, frozenset(x.dtype for x in tensors)
    )
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, not '{name}'")
    for its_name, candidate in _CANDIDATES.items():
        devices = candidate.first_choice_on
        is_asked = its_name == name or (name == "auto" and (devices is None or wanted.device in devices))
        found = candidate.find(wanted) if is_asked else None
        if found is not None:
            return found
    types = ", ".join(sorted(str(d) for d in wanted.dtypes))
    raise ValueError(
        f"backend '{name}' cannot be had for {types} on {wanted.device} with the divergence"
        f" '{wanted.spec.divergence}'; use backend='auto'"
    )


def _find_native(wanted: Wanted) -> Backend | None:
    library = native.library() if native.Native.supports(wanted) else None
    return None if library is None else native.Native(library)


def _find_triton(wanted: Wanted) -> Backend | None:
    made = _triton()
    return made if made is not None and made.supports(wanted) else None


@functools.cache
def _triton() -> Backend | None:
    """The Triton kernels, or None after a warning that they are not there."""
    try:
        from megatron_opd.loss.fused.triton_rows import TritonRows
    except ImportError as error:
        warnings.warn(f"the loss runs without its Triton kernels, several times slower: {error}", stacklevel=2)
        return None
    return TritonRows()


_CANDIDATES = {
    "native": _Candidate(("cpu",), _find_native),
    "triton": _Candidate(("cuda",), _find_triton),
    "torch": _Candidate(None, lambda wanted: Reference() if Reference.supports(wanted) else None),
    "readable": _Candidate(None, lambda wanted: Readable()),
}
"""By name, in the order in which they are tried."""
NAMES = ("auto", *_CANDIDATES)
