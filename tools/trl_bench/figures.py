"""What either run tells: seconds by step, and resident memory above that after the imports.

Seconds of the CPU count beside those of the clock: with one thread on an idle core they are the same, and on a busy
machine only they compare.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path


class Figures:
    """Made when everything is imported and nothing is loaded."""

    def __init__(self, folder: str) -> None:
        self.settings = json.loads((Path(folder) / "settings.json").read_text())
        self.before = _resident()
        self.steps: list[float] = []
        self.cpu: list[float] = []
        self.generate: list[float] = []
        self.losses: list[float] = []
        self.begin()

    def begin(self) -> None:
        """A step begins now."""
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def step(self, loss: float, generate_s: float) -> None:
        """A step has ended."""
        self.steps.append(time.perf_counter() - self.started)
        self.cpu.append(time.process_time() - self.cpu_started)
        self.generate.append(generate_s)
        self.losses.append(loss)
        self.begin()

    def tell(self) -> None:
        """One line of JSON on stdout."""
        warmup, batch = self.settings["warmup"], self.settings["batch"]
        timed = self.steps[warmup:]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        told = {
            "samples_per_s": batch * len(timed) / sum(timed),
            "samples_per_cpu_s": batch * len(timed) / sum(self.cpu[warmup:]),
            "step_s": timed,
            "generate_s": sum(self.generate[warmup:]) / len(timed),
            "peak_mb": (peak - self.before) / 1e6,
            "losses": self.losses,
        }
        print(json.dumps(told), flush=True)


def _resident() -> float:
    """Bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
