"""Seconds of each stage of each step, and the most memory that the process had."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from statistics import fmean


class Stages:
    """`settings` are those of the folder's settings.json."""

    def __init__(self, folder: str) -> None:
        self.settings = json.loads((Path(folder) / "settings.json").read_text())
        self.seconds: dict[str, list[float]] = {}
        self.prompt_tokens = 0
        """Tokens of all steps' prompts: the programs must read the same text."""

    def add(self, **seconds: float) -> None:
        """A step has ended; its stages are the same in all steps."""
        for name, value in seconds.items():
            self.seconds.setdefault(name, []).append(value)

    def tell(self, **more: float) -> None:
        """One line of JSON on stdout: mean seconds of a step after the warm-up, bytes, and `more`."""
        told = {name: fmean(found[self.settings["warmup"] :]) for name, found in self.seconds.items()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(
            json.dumps(
                {**told, "whole step": sum(told.values()), "peak": peak, "prompt tokens": self.prompt_tokens, **more}
            ),
            flush=True,
        )
