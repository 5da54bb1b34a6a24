"""Time and memory of a call: CPU time of the process, wall, CUDA events; peak beyond what was there before."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

_AT_LEAST_S = 3.0
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # as in malloc.h
Call = tuple[Callable[[], Any], Callable[[Any], Any]]
"""Makes fresh arguments (not timed); does the work with them."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of every round, by call and clock."""

    rounds: list[dict[str, dict[str, float]]]

    def best(self) -> dict[str, dict[str, float]]:
        """The best round of each call."""
        first = self.rounds[0]
        return {name: {c: min(r[name][c] for r in self.rounds) for c in first[name]} for name in first}

    def ratio(self, of: str, to: str, clock: str = "cpu_ms") -> float:
        """Time of one call over that of another, the median over rounds: a machine's slow moments last longer than a
        round, so both have them."""
        return median(r[of][clock] / r[to][clock] for r in self.rounds)


def times(calls: dict[str, Call], rounds: int) -> Times:
    """Times of all calls, which take turns: of `rounds`, or of as many as fit into some seconds where that are more,
    after one to warm up."""
    found: list[dict[str, dict[str, float]]] = []
    start = time.perf_counter()
    while len(found) <= rounds or time.perf_counter() - start < _AT_LEAST_S:
        found.append({name: _once(*call) for name, call in calls.items()})
    return Times(found[1:])


def keep_memory() -> None:
    """Make the C library keep what is freed. By default the pages of every large tensor are made anew, which methods
    that allocate such tensors pay for several times over; without that, times are those of the arithmetic."""
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc
        library = ctypes.CDLL(None)
        for option, value in ((_M_MMAP_THRESHOLD, 2**31 - 1), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**29)):
            library.mallopt(option, value)


def clock(device: str) -> str:
    """The clock that figures are read from."""
    return "cuda_ms" if device == "cuda" else "cpu_ms"


def _once(prepare: Callable[[], Any], work: Callable[[Any], Any]) -> dict[str, float]:
    arguments = prepare()
    gc.collect()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
    cpu, wall = time.process_time(), time.perf_counter()
    work(arguments)
    found = {"cpu_ms": 1e3 * (time.process_time() - cpu)}
    if on_gpu:
        end.record()
        torch.cuda.synchronize()
        found["cuda_ms"] = start.elapsed_time(end)
    return {**found, "wall_ms": 1e3 * (time.perf_counter() - wall)}


def peak_extra(call: Call, device: str) -> int:
    """Bytes that the work takes at its peak beyond its arguments. On a CPU in a fresh process only: resident memory."""
    prepare, work = call
    arguments = prepare()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work(arguments)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    work(arguments)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(f"there is no {name} in /proc/self/status: memory is measured on Linux only")
