"""What came out of a run: one table for people, the same in report.md, and four panels in report.png.

Reads only what every run writes, metrics.jsonl and config.yaml, so it works on an unfinished run, on one that was
killed, and on one copied from another machine. What was not measured is left out or shown as a dash, never guessed.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_opd.core.run_dir import CHECKPOINTS, HF_EXPORT, complete
from megatron_opd.tracking.headline import fitting
from megatron_opd.tracking.report_likeness import agreement_table, nll_table, plot_agreement
from megatron_opd.tracking.report_run import ALL, RecordedRun, last_value, read_run
from megatron_opd.tracking.report_tables import MISSING, Table, grades_table, percent, to_markdown, to_rich
from megatron_opd.tracking.tracker import METRICS_FILE

STAGES = ("generate", "score", "step", "sync")
_INK, _GRID = "#333333", "#e3e3e3"
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")  # told apart by all


def report(run_dir: str | Path, *, console: Console) -> None:
    """Print the tables of a run and write report.md and report.png into its directory."""
    run = read_run(Path(run_dir))
    plot_path = run.dir / "report.png"
    plot(run, plot_path)
    likeness = agreement_table(run), kl_table(run), nll_table(run)
    tables = [t for t in (accuracy_table(run), last_grades(run), *likeness, speed_table(run)) if t.lines]
    notes = [headline(run), *(f"{what}: {path}" for what, path in places(run))]
    for table in tables:
        console.print(to_rich(table))
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    text = [f"# {run.dir.name}", notes[0], *map(to_markdown, tables), "\n".join(f"- {note}" for note in notes[1:])]
    (run.dir / "report.md").write_text("\n\n".join([*text, f"![four panels]({plot_path.name})\n"]))


def print_grades(what: str, metrics: Mapping[str, float], *, console: Console) -> None:
    """The table of an evaluation, whose metrics `evaluate.means` gives."""
    console.print(f"Evaluation in percent, with 95 % intervals, {what}", markup=False, highlight=False, soft_wrap=True)
    console.print(to_rich(grades_table(metrics, title="")))


def accuracy_table(run: RecordedRun) -> Table:
    """One row per task and one for all of them: student before, every teacher, student after."""
    steps = list(run.series(f"eval/accuracy/{ALL}")) or sorted({s for t in run.sources for s in _student(run, t)})
    lines = []
    for task in [*run.sources, ALL]:
        values = list(_student(run, task).values())
        teachers = [last_value(run.series(f"eval/teacher/{name}/accuracy/{task}")) for name in run.teachers]
        last = values[-1] if len(values) > 1 else None
        gain = f"{100 * (last - values[0]):+.1f}" if last is not None else MISSING
        first = values[0] if values else None
        if values or any(value is not None for value in teachers):
            lines.append([task, *map(percent, [first, *teachers, last]), gain])
    header = ["task", "student\nbefore", *run.teachers, "student\nafter", "gain"]
    when = f" (student after step {steps[-1]})" if len(steps) > 1 else ""
    title = f"Greedy accuracy in percent{when}"
    return Table(title=title, header=header, lines=lines, total=len(lines) > 1 and lines[-1][0] == ALL)


def last_grades(run: RecordedRun) -> Table:
    """Every measure of the student's last evaluation, with its interval."""
    steps = run.series(f"eval/accuracy_low/{ALL}")
    step = list(steps)[-1] if steps else None
    metrics = {name: value for row in run.rows if row["step"] == step for name, value in row.items()}
    order = {task: i for i, task in enumerate(run.sources)}
    return grades_table(metrics, title=f"Evaluation in percent after step {step}, 95 % intervals", order=order)


def kl_table(run: RecordedRun) -> Table:
    """Divergence to every teacher and to the combined target: held-out if evaluated, else on the rollouts."""
    held_out = any(name.startswith("eval/kl/") for row in run.rows for name in row)
    prefix, where = ("eval/kl/", "held-out prompts") if held_out else ("kl/", "training rollouts")
    lines = []
    for name in [*run.teachers, "ensemble"]:
        for first, last in run.ends(prefix + name):
            lines.append([f"{name}{_bound(run, name)}", _number(first), _number(last), _ratio(first, last)])
    header = ["KL, nats/token", "before", "after", "change"]
    title = f"Distance from student to teacher, {where}"
    return Table(title=title, header=header, lines=lines, total=len(lines) > 1 and lines[-1][0].startswith("ensemble"))


def _bound(run: RecordedRun, name: str) -> str:
    """Words behind a KL to a teacher that lists its likeliest tokens alone, or to a target with such teachers: lists of
    several teachers differ, so that KL may be too large as well."""
    pattern = f"topk/{'*' if name == 'ensemble' else name}/mass_outside"
    listed = {metric for row in run.rows for metric in fitting(pattern, row)}
    return " (top-k, approximate)" if len(listed) > 1 else " (top-k, a lower bound)" if listed else ""


def speed_table(run: RecordedRun) -> Table:
    """Medians over the steps: the first step, which warms everything up, does not count for more than one."""
    medians = {stage: statistics.median(v) for stage in STAGES if (v := _finite(run, f"time/{stage}"))}
    total = sum(medians.values())
    lines = [[stage, f"{value:.3f}", f"{100 * value / total:.0f} %"] for stage, value in medians.items() if total > 0]
    if lines:
        lines.append(["whole step", f"{total:.3f}", "100 %"])
    return Table(title="Time per step", header=["stage", "seconds (median)", "share"], lines=lines, total=bool(lines))


def headline(run: RecordedRun) -> str:
    """Steps done, speed and time in one sentence."""
    done = max(int(row["step"]) for row in run.rows)
    planned = (run.config.get("train") or {}).get("steps")
    parts = [f"{done} of {planned} steps" if planned else f"{done} step{'s' if done != 1 else ''}"]
    if planned and done < planned:
        parts[0] += " (unfinished)"
    if tokens := _finite(run, "tokens_per_s"):
        parts.append(f"{statistics.median(tokens):,.0f} tokens/s (median)")
    if seconds := _finite(run, "time_s"):
        parts.append(f"{seconds[-1]:,.0f} s in all")
    return ", ".join(parts)


def places(run: RecordedRun) -> list[tuple[str, Path]]:
    """Where everything was written: what is there, and the report that is about to be."""
    newest = [("newest checkpoint", path) for path in complete(run.dir / CHECKPOINTS)[-1:]]
    fixed = {
        "metrics": METRICS_FILE,
        "log": "train.log",
        "Hugging Face export": HF_EXPORT,
        "TensorBoard": "tensorboard",
    }
    there = [(what, run.dir / name) for what, name in fixed.items() if (run.dir / name).exists()]
    return [*newest, *there, ("tables", run.dir / "report.md"), ("plot", run.dir / "report.png")]


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
            if not axis.get_xlabel():
                axis.set_xlabel("step")
        figure.suptitle(f"{run.dir.name}: {headline(run)}", x=0.01, ha="left", color=_INK)
        figure.savefig(path)
        pyplot.close(figure)


def _plot_held_out(run: RecordedRun, axis: Any) -> bool:
    """The agreement where it was measured: it moves where a small model is right about nothing. Else the accuracy."""
    return plot_agreement(run, axis, _PALETTE) or _plot_accuracy(run, axis)


def _plot_accuracy(run: RecordedRun, axis: Any) -> bool:
    axis.set_title("Greedy accuracy, %")
    tasks = [task for task in run.sources if _student(run, task)]
    for task, color in zip(tasks, itertools.cycle(_PALETTE), strict=False):
        _line(axis, _student(run, task), scale=100, color=color, label=task, lw=1.2, marker="o", ms=3)
    overall = _student(run, ALL)
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
    if positive:  # a log axis leaves out what rounding made 0 or negative
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
        other.set_ylim(0, 1.1 * max([v for v in norm.values() if math.isfinite(v)], default=1.0) or 1.0)
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
    # A slow first step (warm-up) would flatten all others: it may leave the panel at the top.
    axis.set_ylim(0, 1.3 * (sorted(floor)[int(0.95 * (len(floor) - 1))] or 1.0))
    axis.legend(ncols=len(STAGES), loc="upper right")
    return True


def _line(axis: Any, series: dict[int, float], *, scale: float = 1.0, **style: Any) -> None:
    if len(series) == 1:  # a line through one point cannot be seen
        style["marker"] = "o"
    if series:
        axis.plot(list(series), [scale * value for value in series.values()], **style)


def _student(run: RecordedRun, task: str) -> dict[int, float]:
    return run.series(f"eval/accuracy/{task}")


def _finite(run: RecordedRun, name: str) -> list[float]:
    return [value for value in run.series(name).values() if math.isfinite(value)]


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"


def _ratio(first: float, last: float | None) -> str:
    """How many times closer the student came; no ratio where rounding made one of the two 0 or negative."""
    if last is None or not (first > 0 and last > 0):
        return MISSING
    return f"{first / last:.3g}x closer" if last <= first else f"{last / first:.3g}x further"
