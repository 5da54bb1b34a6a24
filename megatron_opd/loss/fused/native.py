"""The rows on a CPU by `kernels.cpp`, compiled at first use and kept.

The compiler is called directly: the code needs no header of torch (seconds, not a minute), and several ranks that
start at once each compile into a file of their own and rename it, so no lock can be left behind by one that was killed.
Without a compiler, or where it fails, `library` says so once and returns None; the reference then does the work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

from megatron_opd.loss.divergences import GKD
from megatron_opd.loss.fused.backend import Wanted
from megatron_opd.loss.fused.reference import Reference
from megatron_opd.loss.fused.statistics import LogitRows, LossSpec

SOURCE = Path(__file__).with_name("kernels.cpp")
HEADERS = tuple(SOURCE.with_name(name) for name in ("memory.h", "vectors.h"))
DTYPES = (torch.float32, torch.bfloat16)
_KINDS = {"forward": 0, "reverse": 1, "jsd": 2}
_STATS, _SUMS, _GRADIENT = 1, 2, 4
_INSTRUCTIONS = {"AVX512": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "AVX2": ["-march=x86-64-v3"]}
"""By what torch finds; nothing for others. Not -march=native: the cache may be shared by machines that differ."""
_FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-shared",
    "-fPIC",
]
_COMPILE_TIMEOUT_S = 300


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
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None after a warning that says why not. Compiles at most once a machine."""
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"the loss runs without its native kernels, several times slower: {said.strip()[-400:]}", stacklevel=2
        )
        return None


def _built() -> Path:
    """The shared library in the cache, compiled where it is not there. Raises OSError, SubprocessError."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise OSError(f"there is no C++ compiler '{compiler}' (CXX names another one)")
    flags = [*_FLAGS, *_INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])]
    code = b"".join(path.read_bytes() for path in (SOURCE, *HEADERS))
    key = hashlib.sha256(code + " ".join([compiler, *flags]).encode()).hexdigest()[:16]
    target = _cache() / f"kernels-{key}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / "kernels.so"
        for threads in (["-fopenmp"], []):  # some compilers come without the OpenMP library
            command = [compiler, *flags, *threads, str(SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
            if done.returncode == 0:
                made.replace(target)
                return target
        raise subprocess.CalledProcessError(done.returncode, command, stderr=done.stderr)


def _cache() -> Path:
    """MEGATRON_OPD_CACHE, or a directory in the user's cache."""
    own = os.environ.get("MEGATRON_OPD_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_opd"
