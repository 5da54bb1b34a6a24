"""What a run directory holds: the rows of metrics.jsonl, the config, and the names that occur in them."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from megatron_opd.config import goals, yaml_text
from megatron_opd.core.run_dir import CONFIG
from megatron_opd.tracking.tracker import METRICS_FILE, read_metrics

ALL = "all"
STAGES = ("generate", "score", "step", "sync")
"""The parts of a step that take time."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RecordedRun:
    """The rows of a run and the names that occur in them."""

    dir: Path
    config: dict[str, Any]
    """The resolved config; empty if the run directory has none."""
    rows: list[dict[str, float]]
    sources: list[str]
    """Evaluated prompt sources, in the order of the config; without the overall figure."""
    teachers: list[str]

    def series(self, name: str) -> dict[int, float]:
        """The metric by step; a step that was logged twice counts once, with its last value."""
        found = {int(row["step"]): row[name] for row in self.rows if name in row}
        return dict(sorted(found.items()))

    def finite(self, name: str) -> list[float]:
        """The metric's values in the order of steps, without what is no number."""
        return [value for value in self.series(name).values() if math.isfinite(value)]

    def accuracy(self, task: str) -> dict[int, float]:
        """The student's, by step."""
        return self.series(f"eval/accuracy/{task}")

    def ends(self, name: str) -> list[tuple[float, float | None]]:
        """(the metric's first value, its last one where there is another), in a list that is empty without a value."""
        values = list(self.series(name).values())
        return [(values[0], values[-1] if len(values) > 1 else None)] if values else []


def _is_enough(run: RecordedRun) -> bool:
    conditions = map(goals.condition, (run.config.get("train") or {}).get("stop_when") or ())
    return any(each.holds(list(run.series(each.metric).values())) for each in conditions)


def headline(run: RecordedRun) -> str:
    """Steps done, speed and time in one sentence."""
    done = max(int(row["step"]) for row in run.rows)
    planned = (run.config.get("train") or {}).get("steps")
    parts = [f"{done} of {planned} steps" if planned else f"{done} step{'s' if done != 1 else ''}"]
    if planned and done < planned:
        parts[0] += " (ended by train.stop_when)" if _is_enough(run) else " (unfinished)"
    if tokens := run.finite("tokens_per_s"):
        parts.append(f"{statistics.median(tokens):,.0f} tokens/s (median)")
    if seconds := run.finite("time_s"):
        parts.append(f"{seconds[-1]:,.0f} s in all")
    return ", ".join(parts)


def read_run(run_dir: Path) -> RecordedRun:
    """Raises ValueError that says what is wrong with the directory."""
    if not run_dir.is_dir():
        raise ValueError(f"there is no run directory {run_dir}")
    metrics = run_dir / METRICS_FILE
    if not metrics.is_file():
        raise ValueError(f"{run_dir} is not a run directory: it has no {METRICS_FILE}")
    rows = read_metrics(metrics)
    if not rows:
        raise ValueError(f"{metrics} is empty: the run stopped before its first step, see train.log beside it")
    config_file = run_dir / CONFIG
    config = _read_config(config_file) if config_file.is_file() else {}
    names = list(dict.fromkeys(name for row in rows for name in row))
    sources = _captured(names, r"eval/(?:(?:teacher/.+/)?accuracy|nll|forced_agreement/[^/]+)/(.+)")
    teachers = _captured(names, r"(?:eval/)?kl/(.+)") + _captured(names, r"eval/teacher/(.+)/accuracy/.+")
    return RecordedRun(
        dir=run_dir,
        config=config,
        rows=rows,
        sources=_ordered(sources, (config.get("data") or {}).get("eval") or (), without=ALL),
        teachers=_ordered(teachers, config.get("teachers") or (), without="ensemble"),
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml_text.load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read: {reason}; remove it to see the report without it") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not the config of a run; remove it to see the report without it")
    return config


def last_value(series: dict[int, float]) -> float | None:
    return list(series.values())[-1] if series else None


def _captured(names: Iterable[str], pattern: str) -> list[str]:
    return [match[1] for name in names if (match := re.fullmatch(pattern, name))]


def _ordered(names: Iterable[str], entries: Iterable[dict[str, Any]], *, without: str) -> list[str]:
    """Each name once; first those that the config lists, in its order."""
    found = [name for name in dict.fromkeys(names) if name != without]
    listed = [entry["name"] for entry in entries if entry["name"] in found]
    return list(dict.fromkeys([*listed, *found]))
