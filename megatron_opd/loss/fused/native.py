"""The rows on a CPU by `kernels.cpp`, compiled at first use and kept (`compiled.py`)."""

from __future__ import annotations

import ctypes
import functools

import torch

from megatron_opd.loss.divergences import GKD
from megatron_opd.loss.fused import compiled
from megatron_opd.loss.fused.backend import Wanted
from megatron_opd.loss.fused.reference import Reference
from megatron_opd.loss.fused.statistics import LogitRows, LossSpec

DTYPES = (torch.float32, torch.bfloat16)
_KINDS = {"forward": 0, "reverse": 1, "jsd": 2}
_STATS, _SUMS, _GRADIENT = 1, 2, 4


class _Matrix(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("is_bf16", ctypes.c_int64))

    @classmethod
    def of(cls, x: torch.Tensor) -> _Matrix:
        assert x.stride(-1) == 1
        return cls(x.data_ptr(), x.stride(0), x.dtype == torch.bfloat16)


class _Job(ctypes.Structure):
    """`struct Job` of kernels.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "width", "columns")),
        *(
            (name, ctypes.c_int64)
            for name in ("kind", "probs", "first_teacher", "teacher_columns", "gaps", "phases", "threads")
        ),
        *((name, ctypes.c_int64) for name in ("num_teachers", "num_stats")),
        *((name, ctypes.c_double) for name in ("beta", "inv_t", "sampler_ratio")),
        ("student", _Matrix),
        ("teachers", ctypes.POINTER(_Matrix)),
        *((name, ctypes.c_void_p) for name in ("index", "weights", "stats", "sums", "center", "scale")),
    )


class Native(Reference):
    """The compiled backend for float32 and bfloat16."""

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    @staticmethod
    def supports(wanted: Wanted) -> bool:
        """As `Backend.supports`."""
        return wanted.device == "cpu" and wanted.dtypes <= set(DTYPES) and wanted.spec.divergence == GKD

    def whole(
        self, rows: LogitRows, asked: LossSpec, scale_R: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `Reference.whole`, in one look at each row."""
        stats_RK, sums_R3 = _new(rows, asked.num_stats), _new(rows, 3)
        phases = _STATS | _SUMS | (_GRADIENT if scale_R is not None else 0)
        self._run(rows, asked, phases, stats=stats_RK, sums=sums_R3, scale=scale_R)
        return stats_RK, sums_R3 if asked.has_sums else None

    def stats(self, rows: LogitRows, asked: LossSpec) -> torch.Tensor:
        """As `Reference.stats`."""
        stats_RK = _new(rows, asked.num_stats)
        self._run(rows, asked, _STATS, stats=stats_RK)
        return stats_RK

    def sums(self, rows: LogitRows, asked: LossSpec, stats_RK: torch.Tensor) -> torch.Tensor:
        """As `Reference.sums`."""
        sums_R3 = _new(rows, 3)
        self._run(rows, asked, _SUMS, stats=stats_RK, sums=sums_R3)
        return sums_R3

    def gradient(
        self, rows: LogitRows, asked: LossSpec, stats_RK: torch.Tensor, center_scale: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """As `Reference.gradient`."""
        center_R, scale_R = center_scale
        self._run(rows, asked, _GRADIENT, stats=stats_RK, center=center_R, scale=scale_R)

    def _run(self, rows: LogitRows, asked: LossSpec, phases: int, **arrays: torch.Tensor | None) -> None:
        kept = {name: x.double().contiguous() for name, x in arrays.items() if x is not None}
        assert all(kept[name] is arrays[name] for name in ("stats", "sums") if name in kept), "these are outputs"
        kept["weights"] = rows.weights_RN.float().contiguous()
        if rows.index_R is not None:
            kept["index"] = rows.index_R.contiguous()
        teachers = (_Matrix * len(rows.teachers))(*[_Matrix.of(t) for t in rows.teachers])
        job = _Job(
            rows=rows.num_rows, width=rows.width, columns=rows.student_RL.shape[1],
            kind=_KINDS[asked.kind], probs=asked.is_probs, teacher_columns=asked.teacher_columns,
            first_teacher=asked.first_teacher if asked.has_teachers else 0,
            gaps=asked.by_teacher, phases=phases, threads=torch.get_num_threads(),
            num_teachers=len(rows.teachers), num_stats=asked.num_stats,
            beta=asked.beta, inv_t=1 / asked.temperature, sampler_ratio=asked.sampler_ratio,
            student=_Matrix.of(rows.student_RL), teachers=teachers,
            **{name: x.data_ptr() for name, x in kept.items()},
        )  # fmt: skip
        self._library.megatron_opd_rows(ctypes.byref(job))


def _new(rows: LogitRows, columns: int) -> torch.Tensor:
    return torch.empty(rows.num_rows, columns, dtype=torch.float64)


@functools.cache
def found() -> compiled.CompiledKernels | str:
    """The compiled kernels, or why there are none. Looks, and compiles, at most once a process, so that no process
    changes over in the middle of its work."""
    try:
        return compiled.load()
    except compiled.NoKernels as error:
        return str(error)


def library() -> ctypes.CDLL | None:
    """The compiled kernels, if there are any."""
    kernels = found()
    return None if isinstance(kernels, str) else kernels.library
