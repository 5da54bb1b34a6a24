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
    find: Callable[[Wanted], Backend | str | None]
    """None where it does not support what is wanted; why not, where this machine lacks what it takes."""


@dataclass(frozen=True, slots=True)
class Found:
    """The backend that does the work, or why none can."""

    backend: Backend | None
    lacking: str = ""
    """Why this machine does not have a faster one that supports what is wanted; "" where it has."""


def find(wanted: Wanted, name: str = "auto") -> Found:
    """The first backend that supports what is wanted and can be had, by a name other than auto: that one, or none."""
    lacking: list[str] = []
    for its_name, candidate in _CANDIDATES.items():
        devices = candidate.first_choice_on
        is_asked = its_name == name or (name == "auto" and (devices is None or wanted.device in devices))
        found = candidate.find(wanted) if is_asked else None
        if isinstance(found, str):
            lacking.append(found)
        elif found is not None:
            return Found(found, "; ".join(lacking))
    return Found(None, "; ".join(lacking))


def choose(tensors: Sequence[torch.Tensor], name: str = "auto", spec: LossSpec | None = None) -> Backend:
    """The backend for models' logits or hidden states like these, after one warning where a faster one is lacking. By a
    name other than auto: that one, or ValueError where it cannot be had. `spec` None: the default divergence."""
    spec = spec or LossSpec(1.0, 1.0, "logits", 1)
    wanted = Wanted(spec, tensors[0].device.type, frozenset(x.dtype for x in tensors))
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, not '{name}'")
    found = find(wanted, name)
    if found.backend is None:
        raise ValueError(f"{refusal(wanted, name, found.lacking)}; use backend='auto'")
    if found.lacking:
        _warn_once(found.lacking)
    return found.backend


def refusal(wanted: Wanted, name: str, lacking: str) -> str:
    """The sentence that says that the backend `name` cannot be had, and what this machine is lacking, if it is that."""
    types = ", ".join(sorted(str(d) for d in wanted.dtypes))
    why = f" ({lacking})" if lacking else ""
    return (
        f"backend '{name}' cannot be had{why} for {types} on {wanted.device} with the divergence"
        f" '{wanted.spec.divergence}'"
    )


@functools.cache
def _warn_once(lacking: str) -> None:
    warnings.warn(f"the loss runs without its fastest kernels, several times slower: {lacking}", stacklevel=3)


def _find_native(wanted: Wanted) -> Backend | str | None:
    if not native.Native.supports(wanted):
        return None
    library = native.library()
    return native.Native(library) if library is not None else f"the native kernels are not there: {native.found()}"


def _find_triton(wanted: Wanted) -> Backend | str | None:
    made = _triton()
    return made if isinstance(made, str) or made.supports(wanted) else None


@functools.cache
def _triton() -> Backend | str:
    """The Triton kernels, or why they are not there."""
    try:
        from megatron_opd.loss.fused.triton_rows import TritonRows
    except ImportError as error:
        return f"the Triton kernels are not there: {error}"
    return TritonRows()


_CANDIDATES = {
    "native": _Candidate(("cpu",), _find_native),
    "triton": _Candidate(("cuda",), _find_triton),
    "torch": _Candidate(None, lambda wanted: Reference() if Reference.supports(wanted) else None),
    "readable": _Candidate(None, lambda wanted: Readable()),
}
"""By name, in the order in which they are tried."""
NAMES = ("auto", *_CANDIDATES)
