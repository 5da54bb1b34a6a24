"""The kernels that the loss asks Triton for, compiled for a GPU that is not here.

The rows are on PyTorch's device `meta`: tensors with a shape and no memory. The loss calls its kernels on them as it
does on a GPU, and each call is compiled and noted instead of run, so the specialisation is Triton's own. A driver that
only names a target stands in for CUDA's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megatron_opd.loss.fused.statistics import LogitRows, LossSpec
from megatron_opd.loss.fused.triton_rows import TritonRows

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Case:
    """A loss, and rows that it is asked for."""

    kind: str = "reverse"
    """forward, reverse, jsd."""
    ensemble: str = "logits"
    teachers: int = 1
    dtype: str = "bf16"
    rows: int = 8192
    width: int = 151_936
    stride: int = 0
    """Values from one row to the next; 0: the width."""
    by_teacher: bool = True
    """As the trainer asks."""
    sampler: bool = False
    """Whether the sampling temperature differs from the loss's."""
    indexed: bool = False
    """Whether some tokens are left out, which the interface for logits does."""

    @property
    def spec(self) -> LossSpec:
        beta = {"forward": 0.0, "jsd": 0.5, "reverse": 1.0}[self.kind]
        tau = 0.7 if self.sampler else None
        return LossSpec(beta, 1.0, self.ensemble, self.teachers, by_teacher=self.by_teacher, sampling_temperature=tau)


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel that was asked for, compiled."""

    case: Case
    kernel: str
    """stats, sums, gradient, scale."""
    code: Any = field(repr=False)
    """Triton's `CompiledKernel`."""


class _Target:
    """As much of a driver as compiling needs."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(cases: Sequence[Case], arch: int) -> Iterator[Launch]:
    """Every kernel that the cases ask for, once. `arch`: 90 for sm_90."""
    driver.set_active(_Target(arch))
    seen: set[str] = set()
    for case in cases:
        with _noting() as noted:
            _ask(case)
        for name, code in noted:
            if code.hash not in seen:
                seen.add(code.hash)
                yield Launch(case, name.removesuffix("_kernel"), code)


@contextlib.contextmanager
def _noting() -> Iterator[list[tuple[str, Any]]]:
    """Calls of kernels are compiled, and noted: their names, and what came of it."""
    noted: list[tuple[str, Any]] = []

    def launcher(kernel: Any, grid: Sequence[int]) -> Any:
        def launch(*values: object, **options: object) -> None:
            noted.append((kernel.fn.__name__, kernel.run(*values, grid=grid, warmup=True, **options)))

        return launch

    with mock.patch.object(JITFunction, "__getitem__", launcher):
        yield noted


def _ask(case: Case) -> None:
    """Value and gradient of the whole vocabulary, and the gradient times a factor."""
    stride = case.stride or case.width

    def matrix() -> torch.Tensor:
        size, strides = (case.rows, case.width), (stride, 1)
        return torch.empty_strided(size, strides, dtype=DTYPES[case.dtype], device="meta")

    weights_RN = torch.empty(case.rows, case.teachers, device="meta")
    index_R = torch.empty(case.rows, dtype=torch.int64, device="meta") if case.indexed else None
    rows = LogitRows(matrix(), tuple(matrix() for _ in range(case.teachers)), weights_RN, case.width, index_R)
    backend = TritonRows()
    backend.whole(rows, case.spec, torch.empty(case.rows, dtype=torch.float64, device="meta"))
    backend.scale(rows.student_RL, torch.ones((), device="meta"))
    backend.scale(rows.student_RL, torch.ones(case.rows, device="meta"))


def version() -> str:
    return str(triton.__version__)
