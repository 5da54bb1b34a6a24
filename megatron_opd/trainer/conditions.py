"""Conditions that decide the bits of a run besides its settings and its data: they are kept with a checkpoint, and
compared when the run goes on from there."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

import torch

from megatron_opd.config import StudentConfig, TeacherConfig
from megatron_opd.config.section import section
from megatron_opd.core.parallel import Parallel
from megatron_opd.models import hub
from megatron_opd.models.sampled_digest import sampled_digest
from megatron_opd.trainer.loss_backend import LossBackend

_PACKAGES = ("megatron-opd", "torch", "megatron-core", "transformers", "triton", "transformer-engine")


@section
class Conditions:
    """Conditions of all ranks; where ranks differ, every value that there is."""

    loss_backend: str
    """"" where the loss has no kernels of its own."""
    loss_kernels: str
    """Hash of the compiled ones."""
    loss_note: str
    """Why it is not a faster one, if it is not."""
    threads: str
    """Threads of a rank that share an operation on the CPU: sums are cut by their number."""
    device: str
    versions: dict[str, str]
    models: dict[str, str]
    """Digests of the files that a run goes on reading: the student's config and tokenizer, each teacher. For
    models of the hub Org/Name@commit."""


def measure(
    backend: LossBackend, parallel: Parallel, student: StudentConfig, teachers: Sequence[TeacherConfig]
) -> Conditions:
    """The conditions of this run. Collective over all ranks."""
    everyone = parallel.gather_world((str(torch.get_num_threads()), _device(), _versions()))
    threads, devices, versions = zip(*everyone, strict=True)
    names = dict.fromkeys(name for told in versions for name in told)
    return Conditions(
        loss_backend=backend.name,
        loss_kernels=backend.kernels,
        loss_note=backend.note,
        threads=_all(threads),
        device=_all(devices),
        versions={name: _all(told.get(name, "none") for told in versions) for name in names},
        models=parallel.share_world(lambda: _models(student, teachers)),
    )


def differences(before: Conditions, now: Conditions) -> list[str]:
    """The differences, a line each: `torch 2.13.0 -> 2.14.1; last bits may differ`."""
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
    of_bits = [f"{name} {old} -> {new}; last bits may differ" for name, (old, new) in pairs.items() if old != new]
    return [*of_bits, *_other_models(before.models, now.models)]


def _other_models(before: dict[str, str], now: dict[str, str]) -> list[str]:
    changed = {name: (before[name], found) for name, found in now.items() if before.get(name, found) != found}
    return [
        f"{name} {old} -> {new}" if "@" in old and "@" in new else f"the files of {name} are others than before"
        for name, (old, new) in changed.items()
    ]


def _all(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def _models(student: StudentConfig, teachers: Sequence[TeacherConfig]) -> dict[str, str]:
    own = hub.origin(student.model) or sampled_digest(student.model, has_weights=False)
    theirs = {f"teacher '{t.name}'": hub.origin(t.model) or sampled_digest(t.model) for t in teachers}
    return {"student.model (config and tokenizer)": own, **theirs}


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
