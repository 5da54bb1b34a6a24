"""Whether a run has reached what it is to reach, and whether its weights are the best so far.

Both follow from the rows of metrics.jsonl alone, so a run that continues knows what it knew. Rank 0 decides: only its
rows count, and only they are in the file.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_opd.config import TrainConfig
from megatron_opd.config.goals import condition, is_better, is_smaller_better
from megatron_opd.core import run_dir
from megatron_opd.core.whole_file import write_whole

_EVAL = "eval/"


class Goals:
    """`train.stop_when` and `train.save_best` over the rows of a run."""

    def __init__(self, train: TrainConfig) -> None:
        self.best_of, self.conditions = train.save_best, [condition(text) for text in train.stop_when]
        self._asked = {self.best_of, *(c.metric for c in self.conditions)} - {""}
        self._series: dict[str, dict[int, float]] = defaultdict(dict)

    def __bool__(self) -> bool:
        return bool(self._asked)

    def read(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Rows that were logged before."""
        for row in rows:
            self.feed(row, int(row["step"]))

    def feed(self, row: Mapping[str, float], step: int, *, is_first: bool = False) -> list[str]:
        """A row that is logged; about the first one of its kind, lines for the user on what it lacks."""
        for metric in self._asked & row.keys():
            self._series[metric][step] = float(row[metric])
        return self._unknown(row) if is_first else []

    def is_best(self, step: int) -> bool:
        """Whether no value of `train.save_best` before `step` is as good as that of `step`."""
        values = self._series.get(self.best_of, {})
        if step not in values:
            return False
        smaller = is_smaller_better(self.best_of)
        before = [value for at, value in values.items() if at < step and math.isfinite(value)]
        return math.isfinite(values[step]) and all(is_better(values[step], x, smaller=smaller) for x in before)

    def reached(self) -> str:
        """The conditions that hold, with their values; empty while none does."""
        held = [c for c in self.conditions if c.holds(list(self._series[c.metric].values()))]
        return "; ".join(f"{c} (it is {list(self._series[c.metric].values())[-1]:.4g})" for c in held)

    def record_best(self, directory: Path, step: int) -> None:
        """Say in best.json which weights <run.dir>/best has."""
        said = {"metric": self.best_of, "value": self._series[self.best_of][step], "step": step}
        write_whole(directory / run_dir.BEST_RECORD, json.dumps(said, indent=1) + "\n")

    def _unknown(self, row: Mapping[str, float]) -> list[str]:
        """Lines about metrics that are asked for and that rows like this one do not have."""
        is_evaluation = any(name.startswith(_EVAL) for name in row)
        lines = []
        for metric in sorted(name for name in self._asked if name.startswith(_EVAL) == is_evaluation):
            if metric not in row:
                setting = "train.save_best" if metric == self.best_of else "train.stop_when"
                near = difflib.get_close_matches(metric, row, n=1, cutoff=0.8)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                what = "evaluation" if is_evaluation else "step"
                lines.append(f"warning: {setting}: this {what} has no metric '{metric}'{hint}")
        return lines
