"""What came out of a run: one table for people, the same in report.md, and four panels in report.png.

Reads only what every run writes, metrics.jsonl and config.yaml, so it works on an unfinished run, on one that was
killed, and on one copied from another machine. What was not measured is left out or shown as a dash, never guessed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from megatron_opd.core.run_dir import BEST, CHECKPOINTS, HF_EXPORT, complete
from megatron_opd.tracking.headline import fitting
from megatron_opd.tracking.report_episodes import episodes_table, evaluated
from megatron_opd.tracking.report_likeness import agreement_table, nll_table
from megatron_opd.tracking.report_plot import plot
from megatron_opd.tracking.report_run import ALL, STAGES, RecordedRun, headline, last_value, read_run
from megatron_opd.tracking.report_tables import (
    MISSING,
    Table,
    grades_table,
    percent,
    to_markdown,
    to_rich,
    without_empty_columns,
)
from megatron_opd.tracking.tracker import METRICS_FILE

_OF_TRAINING = {
    "loss": "loss",
    "reward/mean": "reward",
    "kl/ensemble": "KL to the target",
    "entropy": "entropy",
    "rollout/length": "tokens an answer",
    "rollout/truncated_frac": "answers cut, share",
}
"""Metrics of steps that have a line, with its words."""


def report(run_dir: str | Path, *, console: Console) -> None:
    """Print the tables of a run and write report.md and report.png into its directory."""
    run = read_run(Path(run_dir))
    plot_path = run.dir / "report.png"
    plot(run, plot_path)
    likeness = agreement_table(run), kl_table(run), nll_table(run)
    of_steps = training_table(run), episodes_table(run), speed_table(run)
    made = accuracy_table(run), last_grades(run), *likeness, *of_steps
    tables = [without_empty_columns(table) for table in made if table.lines]
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
    if (episodes := evaluated(metrics)).lines:
        console.print(to_rich(episodes))


def accuracy_table(run: RecordedRun) -> Table:
    """One row per task and one for all of them: student before, every teacher, student after."""
    steps = list(run.series(f"eval/accuracy/{ALL}")) or sorted({s for t in run.sources for s in run.accuracy(t)})
    lines = []
    for task in [*run.sources, ALL]:
        values = list(run.accuracy(task).values())
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
    names = [*run.teachers, "ensemble"]
    evaluations = max((len(run.series(f"eval/kl/{name}")) for name in names), default=0)
    steps = max((len(run.series(f"kl/{name}")) for name in names), default=0)
    # One evaluation says nothing about what changed; the steps do where there are several.
    held_out = evaluations > 1 or evaluations >= steps > 0 or (evaluations and not steps > 1)
    prefix, where = ("eval/kl/", "held-out prompts") if held_out else ("kl/", "training rollouts")
    lines = []
    for name in names:
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


def training_table(run: RecordedRun) -> Table:
    """The steps' own numbers, at first and at last: means over a tenth of the steps, which are noisy."""
    done = len(run.series("loss"))
    width = max(done // 10, 1)
    lines = []
    for metric, words in _OF_TRAINING.items():
        values = run.finite(metric)
        if len(values) >= 2 * width:
            first, last = statistics.fmean(values[:width]), statistics.fmean(values[-width:])
            lines.append([words, _number(first), _number(last)])
    ends = f"first and last {width} steps" if width > 1 else "first and last step"
    return Table(title=f"Training, {ends}", header=["mean of", "first", "last"], lines=lines)


def speed_table(run: RecordedRun) -> Table:
    """Medians over the steps: the first step, which warms everything up, does not count for more than one."""
    medians = {stage: statistics.median(v) for stage in STAGES if (v := run.finite(f"time/{stage}"))}
    total = sum(medians.values())
    lines = [[stage, f"{value:.3f}", f"{100 * value / total:.0f} %"] for stage, value in medians.items() if total > 0]
    if lines:
        lines.append(["whole step", f"{total:.3f}", "100 %"])
    return Table(title="Time per step", header=["stage", "seconds (median)", "share"], lines=lines, total=bool(lines))


def places(run: RecordedRun) -> list[tuple[str, Path]]:
    """Where everything was written: what is there, and the report that is about to be."""
    newest = [("newest checkpoint", path) for path in complete(run.dir / CHECKPOINTS)[-1:]]
    fixed = {
        "metrics": METRICS_FILE,
        "log": "train.log",
        "Hugging Face export": HF_EXPORT,
        "best model": BEST,
        "TensorBoard": "tensorboard",
    }
    there = [(what, run.dir / name) for what, name in fixed.items() if (run.dir / name).exists()]
    return [*newest, *there, ("tables", run.dir / "report.md"), ("plot", run.dir / "report.png")]


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"


def _ratio(first: float, last: float | None) -> str:
    """How many times closer the student came; no ratio where rounding made one of the two 0 or negative."""
    if last is None or not (first > 0 and last > 0):
        return MISSING
    return f"{first / last:.3g}x closer" if last <= first else f"{last / first:.3g}x further"
