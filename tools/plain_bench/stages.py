"""Seconds of each stage of each step, and the most memory that the process had."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from statistics import fmean

STAGES = ("generate", "score", "step")


class Stages:
    """`settings` are those of the folder's settings.json."""

    def __init__(self, folder: str) -> None:
        self.settings = json.loads((Path(folder) / "settings.json").read_text())
        self.seconds: dict[str, list[float]] = {name: [] for name in STAGES}

    def add(self, *, generate: float, score: float, step: float) -> None:
        """A step has ended."""
        for name, seconds in zip(STAGES, (generate, score, step), strict=True):
            self.seconds[name].append(seconds)

    def tell(self) -> None:
        """One line of JSON on stdout: mean seconds of a step after the warm-up, and bytes."""
        told = {name: fmean(found[self.settings["warmup"] :]) for name, found in self.seconds.items()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({**told, "whole step": sum(told.values()), "peak": peak}), flush=True)
