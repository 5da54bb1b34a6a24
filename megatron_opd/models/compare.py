"""Whether two models are the same, tensor by tensor, in whichever format each is.

Never more than one parameter of each is in memory. Bits are compared first, so that 0 and -0 are not the same and NaN
is seen; differences are then measured in fp64, in slices. Refuses models whose configs differ in more than padding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_opd.models import convert
from megatron_opd.models.architecture import Architecture, read_architecture
from megatron_opd.models.headers import check_tensors
from megatron_opd.models.safetensors_dir import TensorDir
from megatron_opd.models.torch_dist_dir import TorchDistDir, is_torch_dist

_SLICE = 1 << 20
"""Values whose difference is in memory at once."""
_SAME_SIZE_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class ComparedModel:
    """One of the two models."""

    path: Path
    like: Path
    """Where its config.json is."""
    arch: Architecture
    weights: TensorDir | TorchDistDir


@dataclass(frozen=True, slots=True)
class Difference:
    """What is not equal about one Hugging Face tensor."""

    name: str
    max_abs: float
    """Largest |a - b|; infinite where one is NaN; 0 where only the type differs."""
    dtypes: tuple[torch.dtype, torch.dtype]


def open_side(path: str | Path, like: str | Path | None = None) -> ComparedModel:
    """Open either kind of directory. Raises ValueError when its tensors are not those of its config.json."""
    if not Path(path).is_dir():
        raise ValueError(f"{path} is not a directory")
    where = convert.find_like(path, like) if is_torch_dist(path) else path
    arch = read_architecture(where)
    problems = check_tensors(path, arch)
    if problems:
        raise ValueError("\n".join(problems))
    weights = convert.open_weights(path)
    if isinstance(weights, TorchDistDir):
        arch = convert.stored_architecture(arch, weights)
    return ComparedModel(Path(path), Path(where), arch, weights)


def differing_settings(a: ComparedModel, b: ComparedModel) -> list[str]:
    """Settings of the architecture in which two models differ, padding aside."""
    ours, theirs = dataclasses.asdict(a.arch), dataclasses.asdict(b.arch)
    return [
        f"{key} is {ours[key]} and {theirs[key]}"
        for key in ours
        if key != "padded_vocab_size" and ours[key] != theirs[key]
    ]


def compare(
    a: ComparedModel, b: ComparedModel, progress: Callable[[int], None] = lambda _: None
) -> Iterator[Difference]:
    """The differences between two models, in the order of layers; `progress` gets the values of each parameter."""
    for ours, theirs in zip(convert.parameters(a.arch), convert.parameters(b.arch), strict=True):
        pairs = zip(convert.hf_tensors(ours, a.weights), convert.hf_tensors(theirs, b.weights), strict=True)
        for (name, x), (_, y) in pairs:
            if not same_bits(x, y):
                yield Difference(name, max_difference(x, y), (x.dtype, y.dtype))
        progress(ours.numel)


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    kind = _SAME_SIZE_INT[x.element_size()]
    return torch.equal(x.contiguous().view(kind), y.contiguous().view(kind))


def max_difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """Largest |x - y|; infinite where exactly one of them is NaN or the shapes differ."""
    if x.shape != y.shape:
        return math.inf
    largest = 0.0
    for p, q in zip(x.reshape(-1).split(_SLICE), y.reshape(-1).split(_SLICE), strict=True):
        distance = (p.double() - q.double()).abs()
        distance[(p == q) | (p.isnan() & q.isnan())] = 0  # equal infinities too
        largest = max(largest, distance.nan_to_num(nan=math.inf, posinf=math.inf).max().item())
    return largest
