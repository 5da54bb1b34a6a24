"""How episodes in environments went, as tables: turns, calls, and why they ended."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from megatron_opd.tracking.report_run import ALL, RecordedRun
from megatron_opd.tracking.report_tables import MISSING, Table

_ALWAYS = "episode/turns"
"""Every step with episodes has it."""
_CALLED = "episode/calls_failed_frac"
"""Every step with calls has it."""
_NUMBERS = {_ALWAYS: "turns", "episode/calls": "calls of tools", "episode/trajectories": "trajectories"}
_ENDED, _FAILED = "episode/ended/", "episode/failed/"
"""Shares by reason. A step, or an evaluation, in which nothing went so does not have that metric."""


def episodes_table(run: RecordedRun) -> Table:
    """The training episodes at first and at last, over as many steps as the table of the steps' own numbers."""
    rows = [row for row in run.rows if _ALWAYS in row]
    width = max(len(run.series("loss")) // 10, 1)
    parts = [rows[:width], rows[-width:]] if len(rows) >= 2 * width else []
    ends = f"first and last {width} steps" if width > 1 else "first and last step"
    return Table(title=f"Episodes, {ends}", header=["mean of", "first", "last"], lines=_lines(parts))


def evaluated(metrics: Mapping[str, float]) -> Table:
    """The episodes of an evaluation, whose metrics are `eval/<metric>/<source>`."""
    of_all = {
        name.removeprefix("eval/").removesuffix(f"/{ALL}"): value
        for name, value in metrics.items()
        if name.startswith("eval/episode/") and name.endswith(f"/{ALL}")
    }
    return Table(title="", header=["episodes, mean of", "value"], lines=_lines([[of_all]]) if of_all else [])


def _lines(parts: list[list[dict[str, float]]]) -> list[list[str]]:
    """A line for each metric; `parts` are the rows of each column."""
    names = {name for rows in parts for row in rows for name in row}
    reasons = {name: f"calls failed: {name.removeprefix(_FAILED)}, %" for name in _by_reason(names, _FAILED)}
    reasons |= {name: f"ended: {name.removeprefix(_ENDED)}, %" for name in _by_reason(names, _ENDED)}
    lines = [[words, *(_mean(rows, name) for rows in parts)] for name, words in _NUMBERS.items() if name in names]
    return lines + [[words, *(_percent(rows, name) for rows in parts)] for name, words in reasons.items()]


def _by_reason(names: set[str], kind: str) -> list[str]:
    return sorted(name for name in names if name.startswith(kind))


def _mean(rows: list[dict[str, float]], name: str) -> str:
    values = [row[name] for row in rows if math.isfinite(row.get(name, math.nan))]
    return f"{statistics.fmean(values):.2f}" if values else MISSING


def _percent(rows: list[dict[str, float]], name: str) -> str:
    of = _CALLED if name.startswith(_FAILED) else _ALWAYS
    shares = [row.get(name, 0.0) for row in rows if of in row]
    return f"{100 * statistics.fmean(shares):.1f}" if shares else MISSING
