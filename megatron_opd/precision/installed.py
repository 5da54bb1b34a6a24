"""What of the GPU's software is installed, from metadata alone: nothing is imported that may fail or be wrong."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import torch
from packaging.version import Version

from megatron_opd.core import stacks

_BLOCKWISE_CUDA = "12.9"
"""The first CUDA whose cuBLAS multiplies matrices with a scale a block."""


def has_cuda() -> bool:
    """Whether this machine has a CUDA device for us."""
    return torch.cuda.is_available()


def version(package: str) -> str | None:
    """Of an installed distribution; None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def transformer_engine() -> str | None:
    """The version of Transformer Engine with its PyTorch part; None without either."""
    return version("transformer-engine") if version("transformer-engine-torch") else None


def megatron_problem() -> str | None:
    """Why the megatron-core that is installed is none for us, and which would be; None where it is."""
    try:
        stacks.here()
    except ValueError as error:
        return str(error)
    return None


def fp8_problem(*, of_layers: bool = True) -> str | None:
    """Why real FP8 cannot be had here, and what to do; `of_layers`: of layers, not of output heads alone."""
    if not has_cuda():
        return "there is no CUDA device here; FP8's effect can be studied with precision.fp8.emulate=true"
    if not of_layers:
        return None
    found = transformer_engine()
    if found is None:
        # megatron-core accepts fp8 without Transformer Engine, and then quietly computes without it.
        return "Transformer Engine is not installed, and without it megatron-core would ignore FP8; see docs/gpu.md"
    first, last = stacks.here().transformer_engine
    if not Version(first) <= Version(found) < Version(last):
        return f"Transformer Engine {found} does not fit this megatron-core; install {first} or later, below {last}"
    return None


def fused_attention_problem(*, is_deterministic: bool) -> str | None:
    """Why the device that there is has no fused attention by Transformer Engine, which packed and split sequences need
    (its unfused one takes neither); with flash-attn there is one for deterministic runs on older devices."""
    have, needs = torch.cuda.get_device_capability(), (8, 0)
    if is_deterministic and not version("flash-attn"):
        needs = (9, 0)
    if have >= needs:
        return None
    mode = " with run.deterministic" if needs == (9, 0) else ""
    return f"Transformer Engine's attention does that{mode} from compute capability {needs[0]}.{needs[1]} on"


def recipe_problem(recipe: str) -> str | None:
    """Why the device that there is does not do a recipe."""
    if not has_cuda():
        return None
    have = torch.cuda.get_device_capability()
    needs, name = {"mxfp8": ((10, 0), "Blackwell"), "blockwise": ((9, 0), "Hopper")}.get(recipe, ((8, 9), "Ada"))
    if have < needs:
        return f"it needs a device of the generation {name} or later (compute capability {needs[0]}.{needs[1]})"
    if recipe == "mxfp8" and have >= (12, 0):
        return f"Transformer Engine does not have it for devices of compute capability {have[0]}.{have[1]} yet"
    if recipe == "blockwise" and Version(torch.version.cuda or "0") < Version(_BLOCKWISE_CUDA):
        return f"it needs torch for CUDA {_BLOCKWISE_CUDA} or later, not {torch.version.cuda}"
    return None


def apex_problem() -> str | None:
    """Why the `apex` that is installed must go; None without one, or with NVIDIA's."""
    spec = importlib.util.find_spec("apex")  # of a top-level name: it is not imported
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    if spec is None or any((folder / "optimizers").is_dir() for folder in folders):
        return None
    found = version("apex")
    return (
        f"the installed package apex{f' {found}' if found else ''} is not NVIDIA's Apex but an unrelated web toolkit of"
        " that name on the Python index, and megatron-core would take it for NVIDIA's: pip uninstall apex (docs/gpu.md)"
    )


def has_apex() -> bool:
    """Whether NVIDIA's is there."""
    return importlib.util.find_spec("apex") is not None and apex_problem() is None


def notes(layers: str) -> list[str]:
    """What a run on a GPU uses of it and what in its place, a line each; nothing without a GPU."""
    if not has_cuda():
        return []
    engine = transformer_engine()
    if layers == "local":
        first = "layers: Megatron's own (precision.layers=local)"
    elif engine:
        first = f"layers: Transformer Engine {engine}"
    else:
        first = "layers: Megatron's own, for Transformer Engine is not installed (docs/gpu.md)"
    if engine:
        second = f"optimizer: FusedAdam of Transformer Engine {engine}"
    elif has_apex():
        second = "optimizer: FusedAdam of NVIDIA's Apex"
    else:
        second = "optimizer: torch's AdamW, for neither Transformer Engine nor NVIDIA's Apex is installed (docs/gpu.md)"
    return [first, second]
