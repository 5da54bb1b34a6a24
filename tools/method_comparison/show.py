"""The comparison for people: what would run, tables, a plot; and a file for other programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from method_comparison.methods import Method
from method_comparison.runs import Point, Setting
from method_comparison.schedule import TUNING_SEED, Found, reach
from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH = 140
_TABLES = {"methods": "methods, each prompt routed to its teacher", "teachers": "teachers, by reverse KL"}


def planned(setting: Setting, methods: Sequence[Method], lrs: Sequence[float], seeds: Sequence[int]) -> None:
    """What would run."""
    table = Table("method", "what it sets", title=f"{len(methods) * (len(lrs) + len(seeds))} runs", box=box.SIMPLE)
    for method in methods:
        table.add_row(method.label, " ".join(method.settings) or "-")
    Console().print(table)
    print(f"each: learning rates {', '.join(f'{lr:g}' for lr in lrs)} on seed {TUNING_SEED}, then seeds {seeds}")
    print(f"{setting.steps} steps; kept in {setting.folder / setting.name}")


def results(found: Sequence[Found]) -> None:
    """Medians over seeds, with the least and the largest."""
    for about, title in _TABLES.items():
        lines = [one for one in found if about in one.method.tables]
        if lines:
            Console(width=_WIDTH).print((_methods if about == "methods" else _teachers)(lines, title))
    setting = found[0].setting
    print(f"target: accuracy {setting.target:g} of answers drawn at temperature 1 to held-out prompts, seen every")
    print(f"{setting.eval_every} steps. Medians over seeds (least-largest); {setting.steps} steps at most.")


def _methods(found: Sequence[Found], title: str) -> Table:
    table = Table("", "lr", "steps", "sampled tokens", "core seconds", "reached", "accuracy at the end", title=title)
    table.box = box.MARKDOWN
    for one in found:
        reached = one.reached()
        table.add_row(
            one.method.label,
            f"{one.lr:g}",
            _range([point.step for point in reached], "{:.0f}"),
            _range([point.tokens for point in reached], "{:,.0f}"),
            _range([point.seconds for point in reached], "{:.1f}"),
            f"{len(reached)} of {len(one.curves)}",
            _range([points[-1].accuracy for points in one.curves.values()], "{:.2f}"),
        )
    return table


def _teachers(found: Sequence[Found], title: str) -> Table:
    sources = sorted(next(iter(found[0].curves.values()))[-1].by_source)
    table = Table("", "lr", "steps", "reached", "accuracy at the end", "greedy", *sources, title=title)
    table.box = box.MARKDOWN
    for one in found:
        last = [points[-1] for points in one.curves.values()]
        reached = one.reached()
        table.add_row(
            one.method.label,
            f"{one.lr:g}",
            _range([point.step for point in reached], "{:.0f}"),
            f"{len(reached)} of {len(one.curves)}",
            _range([point.accuracy for point in last], "{:.2f}"),
            _range([point.greedy for point in last], "{:.2f}"),
            *(f"{median(point.by_source[source] for point in last):.2f}" for source in sources),
        )
    return table


def _range(values: Sequence[float], style: str) -> str:
    if not values:
        return "-"
    least, most = style.format(min(values)), style.format(max(values))
    return style.format(median(values)) + (f" ({least}-{most})" if least != most else "")


def write(path: str, found: Sequence[Found]) -> None:
    """Every curve, with the settings that all share."""
    setting = {name: value for name, value in dataclasses.asdict(found[0].setting).items() if name != "folder"}
    methods = [
        {
            "name": one.method.name,
            "settings": one.method.settings,
            "lr": one.lr,
            "tried": {f"{lr:g}": _steps(points, one.setting) for lr, points in one.tried.items()},
            "curves": {str(seed): [dataclasses.asdict(p) for p in points] for seed, points in one.curves.items()},
        }
        for one in found
    ]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"setting": setting, "methods": methods}, indent=1) + "\n")


def _steps(points: Sequence[Point], setting: Setting) -> int | None:
    point = reach(points, setting.target)
    return point.step if point else None


def plot(found: Sequence[Found], path: str) -> None:
    """Mean accuracy over seeds, with all seeds between the edges of the band: over steps, and over sampled tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = [about for about in _TABLES if any(about in one.method.tables for one in found)]
    figure, axes = plt.subplots(len(tables), 2, figsize=(11, 4 * len(tables)), squeeze=False, layout="constrained")
    for (left, right), about in zip(axes, tables, strict=True):
        lines = [one for one in found if about in one.method.tables]
        _draw(left, lines, lambda point: point.step)
        _draw(right, lines, lambda point: point.tokens)
        left.set(xlabel="step", ylabel="accuracy at temperature 1", title=_TABLES[about])
        right.set(xlabel="sampled tokens", xscale="log")
        left.legend(fontsize="small")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw(axis: Any, found: Sequence[Found], where: Callable[[Point], float]) -> None:
    for one in found:
        columns = list(zip(*one.curves.values(), strict=True))
        x = [fmean(where(point) for point in column) for column in columns]
        accuracies = [[point.accuracy for point in column] for column in columns]
        (line,) = axis.plot(x, [fmean(values) for values in accuracies], label=one.method.label)
        low, high = [min(values) for values in accuracies], [max(values) for values in accuracies]
        axis.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axis.axhline(found[0].setting.target, color="gray", linewidth=0.8, linestyle="--")
    axis.set_ylim(0, 1.02)
