"""How fast a kernel can be at most: by the memory that it reads and writes, and by the instructions that it issues.

The numbers of the hardware are NVIDIA's for the H100 SXM: HBM3 at 3.35 TB/s, 132 multiprocessors at 1.755 GHz, and of
the results that a multiprocessor gives in a cycle 128 sums or products in float32, 16 of the special function unit, and
64 of most other instructions; four warps of 32 threads issue in a cycle. `REACHED` is an assumption: kernels that only
stream reach about nine tenths of the peak, and that share of the slots is taken too.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernel_code.launches import DTYPES, Case, Launch
from kernel_code.machine_code import Code

BYTES_A_SECOND = 3.35e12
CYCLES_A_SECOND = 132 * 1.755e9
"""Cycles of all multiprocessors together."""
REACHED = 0.9
COLUMNS = 16
"""Columns of a thread that instructions are told for."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Least times of a kernel over all rows, in seconds."""

    passes: int
    """Matrices that are read or written."""
    memory_s: float
    instructions: float
    """For 16 columns of a thread."""
    issue_s: float
    """The slowest of issue slots, special functions and instructions of half the rate."""

    @property
    def time_s(self) -> float:
        """The time that follows: the slower of the two, at the share of the peak that is reached."""
        return max(self.memory_s, self.issue_s) / REACHED


def of(launch: Launch, code: Code) -> Floor:
    """The floors of stats, sums and gradient; their main loop has the instructions."""
    case = launch.case
    passes = passes_of(launch.kernel, case)
    value_bytes = DTYPES[case.dtype].itemsize
    values = case.rows * case.width
    columns = code.loaded / (value_bytes * (1 + case.teachers))
    cycles = max(code.instructions / 4, code.special / (16 / 32), code.slow / (64 / 32))
    warps = values / (32 * columns)
    return Floor(
        passes,
        passes * values * value_bytes / BYTES_A_SECOND,
        code.instructions * COLUMNS / columns,
        warps * cycles / CYCLES_A_SECOND,
    )


def passes_of(kernel: str, case: Case) -> int:
    """Every matrix is read once; the gradient is written too."""
    return 1 + case.teachers + (kernel == "gradient")
