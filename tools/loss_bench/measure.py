"""Time and memory of a call: CPU time of the process, wall, CUDA events; peak beyond what was there before."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # as in malloc.h
Call = tuple[Callable[[], Any], Callable[[Any], Any]]
"""Makes fresh arguments (not timed); does the work with them."""


def times(calls: dict[str, Call], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds by name: the best of `rounds`, in which all calls take turns, after one round to warm up."""
    best: dict[str, dict[str, float]] = {}
    for number in range(rounds + 1):
        for name, (prepare, work) in calls.items():
            arguments = prepare()
            gc.collect()
            found = _once(work, arguments)
            del arguments
            if number:
                known = best.setdefault(name, found)
                best[name] = {clock: min(known[clock], ms) for clock, ms in found.items()}
    return best


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


def _once(work: Callable[[Any], Any], arguments: Any) -> dict[str, float]:
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
