"""The picture of a run: four panels over its steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_opd.tracking.report_likeness import plot_agreement
from megatron_opd.tracking.report_run import ALL, STAGES, RecordedRun, headline, last_value

_INK, _GRID = "#333333", "#e3e3e3"
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")  # told apart by all
_ROUNDING = 1e-3
"""The share of a value below which its changes are drawn as none."""
_TOLD = 5
"""Bars beyond the panel that say how long they are."""


def plot(run: RecordedRun, path: Path) -> None:
    """Accuracy, divergence, loss and time, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _GRID,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "legend.frameon": True,
        "legend.framealpha": 0.85,
        "legend.edgecolor": "none",
        "legend.fontsize": 8,
        "lines.linewidth": 1.6,
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained", dpi=130)
        panels: list[Callable[[RecordedRun, Any], bool]] = [_plot_held_out, _plot_kl, _plot_loss, _plot_time]
        for panel, axis in zip(panels, axes.flat, strict=True):
            if not panel(run, axis):
                axis.text(0.5, 0.5, "not logged in this run", ha="center", transform=axis.transAxes, color="#888888")
                axis.grid(False)
            axis.xaxis.set_major_locator(ticker.MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
            _tidy(axis)
        figure.suptitle(f"{run.dir.name}: {headline(run)}", x=0.01, ha="left", color=_INK)
        figure.savefig(path)
        pyplot.close(figure)


def _tidy(axis: Any) -> None:
    """Plain numbers at the ticks, and a range that does not magnify rounding."""
    from matplotlib import ticker

    if not axis.get_xlabel():
        axis.set_xlabel("step")
    if axis.get_yscale() == "log":
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        return
    axis.ticklabel_format(axis="y", useOffset=False)
    if values := _drawn(axis):
        low, high = min(values), max(values)
        if high - low <= _ROUNDING * max(abs(low), abs(high)):
            margin = 0.1 * abs(high) or 1.0
            axis.set_ylim(low - margin, high + margin)


def _drawn(axis: Any) -> list[float]:
    """The values of all lines that run over steps."""
    found = [float(value) for line in axis.lines for value in line.get_ydata()]
    return [value for value in found if math.isfinite(value)]


def _ratio(axis: Any) -> float:
    """The largest value, in units of the smallest positive one."""
    values = [value for value in _drawn(axis) if value > 0]
    return max(values) / min(values)


def _plot_held_out(run: RecordedRun, axis: Any) -> bool:
    """The agreement where it was measured: it moves where a small model is right about nothing. Else the accuracy."""
    return plot_agreement(run, axis, _PALETTE) or _plot_accuracy(run, axis)


def _plot_accuracy(run: RecordedRun, axis: Any) -> bool:
    axis.set_title("Greedy accuracy, %")
    tasks = [task for task in run.sources if run.accuracy(task)]
    for task, color in zip(tasks, itertools.cycle(_PALETTE), strict=False):
        _line(axis, run.accuracy(task), scale=100, color=color, label=task, lw=1.2, marker="o", ms=3)
    overall = run.accuracy(ALL)
    _line(axis, overall, scale=100, color="black", label=ALL, lw=2.4, marker="o", ms=4)
    # Teachers have one number each, so they are lines across; the dash pattern tells them apart.
    dashes = itertools.cycle(["--", "-.", ":", (0, (6, 1, 1, 1, 1, 1))])
    for name, dash in zip(run.teachers, dashes, strict=False):
        value = last_value(run.series(f"eval/teacher/{name}/accuracy/{ALL}"))
        if value is not None:
            axis.axhline(100 * value, color="#777777", lw=1.3, ls=dash, label=f"{name} ({ALL})")
    if not axis.lines:
        return False
    axis.set_ylim(-3, 103)
    axis.legend(ncols=2)
    return True


def _plot_kl(run: RecordedRun, axis: Any) -> bool:
    axis.set_title("KL to teachers, nats/token")
    names = [*run.teachers, "ensemble"]
    colors = [*itertools.islice(itertools.cycle(_PALETTE), len(run.teachers)), "black"]
    positive = False
    for name, color in zip(names, colors, strict=True):
        rollouts, held_out = run.series(f"kl/{name}"), run.series(f"eval/kl/{name}")
        _line(axis, rollouts, color=color, alpha=0.5, lw=1.2, label=None if held_out else name)
        _line(axis, held_out, color=color, label=name, marker="o", ms=4, lw=0.8, ls=":")
        positive |= any(value > 0 for value in [*rollouts.values(), *held_out.values()])
    if not axis.lines:
        return False
    if positive and _ratio(axis) > 2:  # a log axis leaves out what rounding made 0 or negative
        axis.set_yscale("log", nonpositive="mask")
    axis.legend()
    axis.set_xlabel("step (lines: training rollouts, dots: held-out prompts)")
    return True


def _plot_loss(run: RecordedRun, axis: Any) -> bool:
    axis.set_title("Loss and gradient norm")
    loss, norm = run.series("loss"), run.series("grad_norm")
    _line(axis, loss, color=_PALETTE[0], label="loss")
    axis.set_ylabel("loss", color=_PALETTE[0])
    if norm:
        other = axis.twinx()
        other.spines["right"].set_visible(True)
        other.grid(False)
        other.set_ylabel("gradient norm", color=_PALETTE[1])
        other.set_ylim(0, 1.1 * max(run.finite("grad_norm"), default=1.0) or 1.0)
        _line(other, norm, color=_PALETTE[1], alpha=0.6, lw=1.1)
    return bool(loss or norm)


def _plot_time(run: RecordedRun, axis: Any) -> bool:
    axis.set_title("Seconds per step, by stage")
    stages = {stage: values for stage in STAGES if (values := run.series(f"time/{stage}"))}
    if not stages:
        return False
    steps = sorted({step for values in stages.values() for step in values})
    edges = [step - 0.5 for step in [*steps, steps[-1] + 1]]
    floor = [0.0] * len(steps)
    for (stage, values), color in zip(stages.items(), _PALETTE, strict=False):
        heights = [v if math.isfinite(v := values.get(step, 0.0)) else 0.0 for step in steps]
        top = [low + height for low, height in zip(floor, heights, strict=True)]
        axis.stairs(top, edges, baseline=floor, fill=True, color=color, label=stage, alpha=0.85)
        floor = top
    # A slow first step (warm-up) would flatten all others: it is cut, and says how long it took.
    highest = 1.3 * (sorted(floor)[int(0.95 * (len(floor) - 1))] or 1.0)
    axis.set_ylim(0, highest)
    cut = [(step, height) for step, height in zip(steps, floor, strict=True) if height > highest]
    for step, height in cut[:_TOLD]:
        axis.annotate(
            f"{height:.3g} s", (step, 0.86 * highest), rotation=90, ha="center", va="top", color="white", size=8
        )
    axis.legend(ncols=len(STAGES), loc="upper right")
    return True


def _line(axis: Any, series: dict[int, float], *, scale: float = 1.0, **style: Any) -> None:
    if len(series) == 1:  # a line through one point cannot be seen
        style["marker"] = "o"
    if series:
        axis.plot(list(series), [scale * value for value in series.values()], **style)
