"""How like its teachers the student is on held-out text: the tables of agreement and cross-entropy, and their panel."""

from __future__ import annotations

import itertools
from typing import Any

from megatron_opd.tracking.report_run import ALL, RecordedRun
from megatron_opd.tracking.report_tables import MISSING, Table, percent

_OWN, _FORCED = "eval/agreement", "eval/forced_agreement"


def agreement_table(run: RecordedRun) -> Table:
    """Share of tokens at which the student's likeliest one is the teacher's, and how much of what lacked is recovered:
    (after - before) / (1 - before)."""
    lines = []
    for what, name in _measures(run):
        for first, last in run.ends(name):
            lines.append([what, percent(first), percent(last), _recovered(first, last)])
    header = ["tokens of", "before", "after", "recovered"]
    return Table(title="Top-1 agreement with the teacher in percent, held-out prompts", header=header, lines=lines)


def nll_table(run: RecordedRun) -> Table:
    """Cross-entropy of the reference answers: real text, which nobody sampled."""
    lines = []
    for source in [*run.sources, ALL]:
        for first, last in run.ends(f"eval/nll/{source}"):
            change = MISSING if last is None else f"{last - first:+.3f}"
            lines.append([source, f"{first:.3f}", MISSING if last is None else f"{last:.3f}", change])
    header = ["nats/token", "before", "after", "change"]
    title = "Cross-entropy of the reference answers, held-out prompts"
    return Table(title=title, header=header, lines=lines, total=len(lines) > 1)


def plot_agreement(run: RecordedRun, axis: Any, palette: tuple[str, ...]) -> bool:
    """The agreement over steps; nothing where none was measured."""
    axis.set_title("Top-1 agreement with the teacher, %")
    measures = [(what, series) for what, name in _measures(run) if (series := run.series(name))]
    for (what, series), color in zip(measures, itertools.cycle(palette), strict=False):
        axis.plot(list(series), [100 * value for value in series.values()], color=color, label=what, marker="o", ms=4)
    if not measures:
        return False
    axis.legend()
    return True


def _measures(run: RecordedRun) -> list[tuple[str, str]]:
    """(what it is in words, its metric), the teachers' answers first."""
    few = len(run.teachers) == 1
    found = []
    for teacher in run.teachers:
        whose = "the teacher's answers" if few else f"{teacher}'s answers"
        found += [(f"{whose}: {source}", f"{_FORCED}/{teacher}/{source}") for source in run.sources]
        found.append((f"{whose}: {ALL}", f"{_FORCED}/{teacher}/{ALL}"))
    with_whom = [("", run.teachers[0])] if few else [(f", with {name}", name) for name in [*run.teachers, "ensemble"]]
    return [*found, *((f"the student's own answers{whom}", f"{_OWN}/{name}") for whom, name in with_whom)]


def _recovered(first: float, last: float | None) -> str:
    return MISSING if last is None or first >= 1 else percent((last - first) / (1 - first))
