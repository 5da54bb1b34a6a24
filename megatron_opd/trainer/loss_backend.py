"""The backend of the fused loss of a run: settled at its start, by all ranks that compute the loss together.

Backends differ in their last bits. So none changes in the middle of a run, no rank has another one than its peers, and
a lesser one than this kind of machine can have is never taken without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_opd.config import LossConfig, StudentConfig, TeacherConfig
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.scores import CARRIERS
from megatron_opd.loss.fused import LossSpec, backends, native
from megatron_opd.loss.fused.backend import Wanted
from megatron_opd.student.model import DTYPES


@dataclass(frozen=True, kw_only=True, slots=True)
class LossBackend:
    """The backend of a run."""

    name: str
    """"" in a run whose loss has no such kernels."""
    kernels: str = ""
    """The hash of compiled ones."""
    note: str = ""
    """Why it is not a faster one, or what was unusual."""


def settle(
    loss: LossConfig, student: StudentConfig, teachers: Sequence[TeacherConfig], parallel: Parallel
) -> LossBackend:
    """The backend that every rank has, by loss.backend. Collective over all ranks.

    Raises ValueError on rank 0 (PeerError on the others) where a rank lacks the one that loss.backend names.
    """
    if not _has_kernels(loss, teachers):
        return LossBackend(name="")
    mine = _look(loss, _wanted(loss, student, teachers)) if parallel.is_last_stage else None
    told = {rank: one for rank, one in enumerate(parallel.gather_world(mine)) if one is not None}
    return parallel.share_world(lambda: _common(told))


def _has_kernels(loss: LossConfig, teachers: Sequence[TeacherConfig]) -> bool:
    """Whether `from_hidden.py` computes the distillation."""
    are_hidden = all(CARRIERS[t.carrier].is_hidden and t.tokenizer != "own" for t in teachers)
    return bool(teachers) and loss.kind == "distribution" and are_hidden


def _wanted(loss: LossConfig, student: StudentConfig, teachers: Sequence[TeacherConfig]) -> Wanted:
    spec = LossSpec(loss.beta, loss.temperature, loss.ensemble, len(teachers), divergence=loss.divergence)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Wanted(spec, device, frozenset(DTYPES[model.dtype] for model in (student, *teachers)))


def _look(loss: LossConfig, wanted: Wanted) -> LossBackend | str:
    """This rank's, or why it has none."""
    found = backends.find(wanted, loss.backend)
    if found.backend is None:
        return backends.refusal(wanted, loss.backend, found.lacking)
    kernels = native.found() if found.backend.name == "native" else None
    if kernels is None or isinstance(kernels, str):
        return LossBackend(name=found.backend.name, note=found.lacking)
    return LossBackend(name=found.backend.name, kernels=kernels.hash, note=kernels.note)


def _common(told: dict[int, LossBackend | str]) -> LossBackend:
    """The backend that every rank has. Raises ValueError where a rank has none."""
    found = {rank: one for rank, one in told.items() if isinstance(one, LossBackend)}
    for rank, why in told.items():
        if isinstance(why, str):
            raise ValueError(f"loss.backend (rank {rank}): {why}; auto takes what can be had")
    name = max((one.name for one in found.values()), key=backends.NAMES.index)
    notes: dict[str, list[int]] = {}
    for rank, one in found.items():
        if one.note:
            notes.setdefault(one.note, []).append(rank)
    ranks = {note: "" if len(those) == len(found) else f" ({_ranks(those)})" for note, those in notes.items()}
    hashes = sorted({one.kernels for one in found.values() if one.name == name and one.kernels})
    return LossBackend(
        name=name, kernels=", ".join(hashes), note="; ".join(f"{note}{where}" for note, where in ranks.items())
    )


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
