"""Tables before they are drawn, drawn for a terminal or as Markdown, and the one of an evaluation."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from megatron_opd.tracking.report_run import ALL

MISSING = "-"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table before it is drawn: the first column is text, the others are numbers."""

    title: str
    header: list[str]
    lines: list[list[str]]
    total: bool = False
    """Whether the last line sums up the others."""


def grades_table(metrics: Mapping[str, float], *, title: str, order: Mapping[str, int] | None = None) -> Table:
    """A row per task and one for all of them, a column per measure that has an interval, which stands after the value.

    `metrics` has `eval/<measure>/<task>`, as `evaluate.means` gives them, and may have others. The mean reward has no
    column where it is the accuracy everywhere.
    """
    found = [match.groups() for name in metrics if (match := re.fullmatch(r"eval/(.+?)_low/(.+)", name))]
    tasks = list(dict.fromkeys(task for _, task in found))
    measures = list(dict.fromkeys(measure for measure, _ in found))
    if all(metrics.get(f"eval/reward/{task}") == metrics.get(f"eval/accuracy/{task}") for task in tasks):
        measures = [measure for measure in measures if measure != "reward"]
    tasks.sort(key=lambda task: (task == ALL, (order or {}).get(task, 0)))
    lines = [[task, *(_with_interval(metrics, measure, task) for measure in measures)] for task in tasks]
    return Table(title=title, header=["task", *measures], lines=lines, total=len(lines) > 1)


def _with_interval(metrics: Mapping[str, float], measure: str, task: str) -> str:
    value, low, high = (metrics.get(f"eval/{measure}{end}/{task}") for end in ("", "_low", "_high"))
    return percent(value) if low is None or high is None else f"{percent(value)} [{100 * low:.0f}–{100 * high:.0f}]"


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}"


def without_empty_columns(table: Table) -> Table:
    """Without columns that say nothing in any line, as those of a second evaluation do while there is one alone."""
    kept = [i for i in range(len(table.header)) if i == 0 or any(line[i] != MISSING for line in table.lines)]
    lines = [[line[i] for i in kept] for line in table.lines]
    return dataclasses.replace(table, header=[table.header[i] for i in kept], lines=lines)


def to_rich(table: Table) -> Group:
    """The title, as wide as the console lets it be, over the table; without a title the table alone."""
    drawn = RichTable()
    for i, name in enumerate(table.header):
        drawn.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for i, line in enumerate(table.lines):
        is_total = table.total and i == len(table.lines) - 1
        drawn.add_row(*line, style="bold" if is_total else None, end_section=table.total and i == len(table.lines) - 2)
    return Group(*([Text(table.title, style="bold")] if table.title else []), drawn)


def to_markdown(table: Table) -> str:
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.lines]
    rows = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]
    return "\n".join([f"## {table.title}", "", *rows])
