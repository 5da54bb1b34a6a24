"""The GPU's software that is installed, and whether it works.

Transformer Engine is imported to see that, where there is a GPU: megatron-core takes an ImportError of it for its
absence, and would quietly use its own layers. What may be another package of the same name is only looked up.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from packaging.version import InvalidVersion, Version

from megatron_opd.core import stacks

_HALF_INTO_FP32 = "2.10"
"""The first torch whose addmm takes `out_dtype` together with `out`."""
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


@dataclass(frozen=True, slots=True)
class Engine:
    """Transformer Engine with its PyTorch part, as an import of it found it."""

    version: str
    """Empty where it has none to tell."""
    failure: Exception | None = None
    """Why it cannot be imported."""

    @property
    def is_quiet(self) -> bool:
        """Whether megatron-core hides the failure."""
        return isinstance(self.failure, ImportError)

    def line(self) -> str:
        """The failure in one line."""
        said = str(self.failure).strip() or "no more is said"
        return f"{type(self.failure).__name__}: {said.splitlines()[0]}"


@functools.cache
def engine() -> Engine | None:
    """Transformer Engine, whether it works or not; None without it or its PyTorch part. Imports it, once: an import
    that failed may fail otherwise the second time."""
    told = version("transformer-engine") or version("transformer-engine-torch") or ""
    try:
        module = imported("transformer_engine.pytorch")
    except Exception as error:  # libraries that are missing or of another CUDA: OSError, RuntimeError, AssertionError
        return None if _is_absent(error) else Engine(told, error)
    return Engine(told or str(getattr(module, "__version__", "")))


def imported(name: str) -> ModuleType:
    """The package that a module is in, with the module imported. Raises what the import raises."""
    importlib.import_module(name)
    return importlib.import_module(name.split(".")[0])


def _is_absent(error: Exception) -> bool:
    """Whether an import failed because the package or its PyTorch part is not there. A package that is there without
    metadata raises a ModuleNotFoundError of metadata."""
    names = ("transformer_engine", "transformer_engine.pytorch")
    is_of_metadata = isinstance(error, importlib.metadata.PackageNotFoundError)
    return isinstance(error, ModuleNotFoundError) and not is_of_metadata and error.name in names


def transformer_engine() -> str | None:
    """The version of a Transformer Engine that works; None without one."""
    found = engine()
    return found.version or "of an unknown version" if found and not found.failure else None


def engine_problem(layers: str) -> str | None:
    """Why a run on a GPU whose `precision.layers` are `layers` must not go on with the Transformer Engine that is
    there."""
    found = engine() if has_cuda() else None
    if found is None or found.failure is None or (layers == "local" and found.is_quiet):
        return None
    what = f"Transformer Engine{found.version and f' {found.version}'} is installed, but importing it fails"
    then = "megatron-core would quietly use its own layers" if found.is_quiet else "megatron-core would fail alike"
    other = ", or set precision.layers=local to do without" if found.is_quiet else ""
    return f"{what} ({found.line()}); {then}: install one that fits, or uninstall it (docs/gpu.md){other}"


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
    if broken := engine_problem("auto"):
        return broken
    found = transformer_engine()
    if found is None:
        # megatron-core accepts fp8 without Transformer Engine, and then quietly computes without it.
        return "Transformer Engine is not installed, and without it megatron-core would ignore FP8; see docs/gpu.md"
    first, last = stacks.here().transformer_engine
    if not _is_within(found, first, last):
        return f"Transformer Engine {found} does not fit this megatron-core; install {first} or later, below {last}"
    return None


def _is_within(found: str, first: str, last: str) -> bool:
    try:
        return Version(first) <= Version(found) < Version(last)
    except InvalidVersion:
        return False


def torch_problem(dtypes: Iterable[str]) -> str | None:
    """Why this torch does not train a student on a GPU whose types (fp32, bf16, fp16) are among `dtypes`."""
    found = torch.__version__.split("+")[0]
    if not has_cuda() or set(dtypes) <= {"fp32"} or Version(found) >= Version(_HALF_INTO_FP32):
        return None
    return (
        f"torch {found} cannot add products of 16 bits to a gradient of 32 on a GPU, as the loss does for the output"
        f" head: install torch {_HALF_INTO_FP32} or later, or set student.dtype=fp32"
    )


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
    works, broken = transformer_engine(), engine()
    if layers == "local":
        first = "layers: Megatron's own (precision.layers=local)"
    elif works:
        first = f"layers: Transformer Engine {works}"
    else:
        first = "layers: Megatron's own, for Transformer Engine is not installed (docs/gpu.md)"
    if works:
        second = f"optimizer: FusedAdam of Transformer Engine {works}"
    elif has_apex():
        second = "optimizer: FusedAdam of NVIDIA's Apex"
    elif broken:
        second = f"optimizer: torch's AdamW, for importing Transformer Engine fails ({broken.line()})"
    else:
        second = "optimizer: torch's AdamW, for neither Transformer Engine nor NVIDIA's Apex is installed (docs/gpu.md)"
    return [first, second]
