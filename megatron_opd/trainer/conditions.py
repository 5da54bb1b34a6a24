"""What decides the bits of a run besides its settings and its data: it is kept with a checkpoint, and compared when the
run goes on from there."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import torch

from megatron_opd.config.section import section
from megatron_opd.core.parallel import Parallel
from megatron_opd.trainer.loss_backend import LossBackend

_PACKAGES = ("megatron-opd", "torch", "megatron-core", "transformers", "triton", "transformer-engine")


@section
class Conditions:
    """Of all ranks; where they differ, every value that there is."""

    loss_backend: str
    """"" where the loss has no kernels of its own."""
    loss_kernels: str
    """Hash of the compiled ones."""
    threads: str
    """Threads of a rank that share an operation on the CPU: sums are cut by their number."""
    device: str
    versions: dict[str, str]


def measure(backend: LossBackend, parallel: Parallel) -> Conditions:
    """Those of this run. Collective over all ranks."""
    everyone = parallel.gather_world((str(torch.get_num_threads()), _device(), _versions()))
    threads, devices, versions = zip(*everyone, strict=True)
    names = dict.fromkeys(name for told in versions for name in told)
    return Conditions(
        loss_backend=backend.name,
        loss_kernels=backend.kernels,
        threads=_all(threads),
        device=_all(devices),
        versions={name: _all(told.get(name, "none") for told in versions) for name in names},
    )


def differences(before: Conditions, now: Conditions) -> list[str]:
    """What is not as it was, a line each: `torch 2.13.0 -> 2.14.1`."""
    names = dict.fromkeys([*before.versions, *now.versions])
    pairs: dict[str, tuple[Any, Any]] = {
        "loss backend": (before.loss_backend or "none", now.loss_backend or "none"),
        "compiled kernels of the loss": (before.loss_kernels, now.loss_kernels),
        "threads of a rank": (before.threads, now.threads),
        "device": (before.device, now.device),
        **{name: (before.versions.get(name, "none"), now.versions.get(name, "none")) for name in names},
    }
    if not (before.loss_kernels and now.loss_kernels):
        del pairs["compiled kernels of the loss"]  # another backend says it all
    return [f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new]


def _all(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
