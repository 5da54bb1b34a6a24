"""The cells for people: what would run, the tables and the plot of docs/results.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from llm_cells.cells import UNKNOWN_LR, Cell, Lines, best, in_order, of_method, recovered, tuning
from llm_cells.methods import METHODS, Method
from llm_cells.runs import trained_steps
from llm_cells.setting import Setting
from rich.console import Console
from rich.table import Table

SEEDS = (1, 2, 3)
"""The seeds of the page."""
_WIDTH = 120
_GUESS_S = 540.0
"""Core seconds of a cell where none is finished."""
_BEGIN, _END = "<!-- llm_results: begin -->", "<!-- llm_results: end -->"
_NOT_RUN = "not run"
_HEAD = (
    "method",
    "lr",
    "seeds",
    "student tokens",
    "recovered, %",
    "KL to the teacher",
    "agreement, own answers, %",
    "cross-entropy",
    "core seconds",
)


def methods(chosen: Sequence[Method]) -> None:
    """Print the methods, with their settings and learning rates."""
    table = Table("method", "label", "what it sets", "learning rates")
    for method in chosen:
        table.add_row(method.name, method.label, " ".join(method.settings), " ".join(map(_rate, method.lrs)))
    Console(width=_WIDTH).print(table)


def planned(chosen: Sequence[Method], seeds: Sequence[int], lines: Lines, setting: Setting) -> None:
    """The cells, their state, and how long they will take."""
    table, total = Table("cell", "state", "core minutes"), 0.0
    for cell in in_order(chosen, seeds, lines):
        steps = 0 if cell.name in lines or cell.lr == UNKNOWN_LR else trained_steps(cell, setting)
        left = 0.0 if cell.name in lines else minutes(cell, steps, lines, setting)
        total += left
        table.add_row(cell.name, _state(cell, steps, lines, setting), f"{left:.0f}" if left else "")
    Console(width=_WIDTH).print(table)
    print(f"about {total:.0f} core minutes are left")


def minutes(cell: Cell, steps: int, lines: Lines, setting: Setting) -> float:
    """About how long a cell will take that has some steps behind it, by those that are finished."""
    its = [line["core_seconds"]["cell"] for line in lines.values() if line["method"] == cell.method.name]
    others = [line["core_seconds"]["cell"] for line in lines.values()]
    return fmean(its or others or [_GUESS_S]) * (1 - steps / setting.steps) / 60


def _state(cell: Cell, steps: int, lines: Lines, setting: Setting) -> str:
    if cell.name in lines:
        return f"finished: {in_short(lines[cell.name])}"
    if cell.lr == UNKNOWN_LR:
        return "waits for the learning rate"
    return f"interrupted after step {steps} of {setting.steps}" if steps else "not begun"


def in_short(line: Mapping[str, Any]) -> str:
    """A finished cell in some words."""
    return f"{_told(line)}, {line['core_seconds']['cell']:.0f} core seconds"


def tables(lines: Lines) -> str:
    """Markdown: how many cells are finished, the methods, and the learning rates that were tried."""
    rows = [_row(_HEAD), _row(["---"] * 3 + ["---:"] * (len(_HEAD) - 3))]
    if lines:
        first = next(iter(lines.values()))["points"][0]
        measures = [f"{first['kl']:.2f}", f"{100 * first['agreement']:.1f}", f"{first['nll']:.2f}"]
        rows.append(_row(["*student before*", "", "", "0", "0", *measures, ""]))
    rows += [row for method in METHODS.values() for row in _of_method(method, lines)]
    tried = [_row(["learning rates tried: recovered, KL", "", "", ""]), _row(["---"] * 4)]
    tried += [_tried(method, lines) for method in METHODS.values()]
    every = in_order(list(METHODS.values()), SEEDS, lines)
    finished = f"{sum(cell.name in lines for cell in every)} of {len(every)} cells are finished."
    return "\n".join([finished, "", *rows, "", *tried])


def _of_method(method: Method, lines: Lines) -> list[str]:
    """A row for each evaluation after the first."""
    its = list(of_method(method, SEEDS, lines))
    lr = best(method, lines)
    rate, seeds = (_rate(lr) if lr != UNKNOWN_LR else "-"), f"{len(its)} of {len(SEEDS)}"
    if not its:
        return [_row([method.label, rate, seeds, *[_NOT_RUN] * (len(_HEAD) - 3)])]
    rows = []
    for i in range(1, len(its[0]["points"])):
        is_last = i + 1 == len(its[0]["points"])
        cells = [
            _spread([line["points"][i]["tokens"] for line in its], "{:,.0f}"),
            _spread([100 * recovered(line)[i] for line in its], "{:.1f}"),
            _spread([line["points"][i]["kl"] for line in its], "{:.3f}"),
            _spread([100 * line["points"][i]["agreement"] for line in its], "{:.1f}"),
            _spread([line["points"][i]["nll"] for line in its], "{:.3f}"),
            _spread([_cost(line) for line in its], "{:.0f}") if is_last else "",
        ]
        rows.append(_row([method.label if i == 1 else "", rate, seeds, *cells]))
    return rows


def _tried(method: Method, lines: Lines) -> str:
    """Recovered and KL by learning rate; the one that is used is in bold type."""
    chosen, cells = best(method, lines), []
    for cell in tuning(method):
        text = f"{_rate(cell.lr)}: {_told(lines[cell.name]) if cell.name in lines else _NOT_RUN}"
        cells.append(f"**{text}**" if cell.lr == chosen else text)
    return _row([method.label, *cells])


def _told(line: Mapping[str, Any]) -> str:
    return f"{100 * recovered(line)[-1]:.1f} %, KL {line['points'][-1]['kl']:.3f}"


def _rate(lr: float) -> str:
    """As people write it: 4e-4."""
    return f"{lr:.0e}".replace("e-0", "e-")


def _cost(line: Mapping[str, Any]) -> float:
    return float(line["core_seconds"]["training"] + line["core_seconds"]["samples"])


def _spread(values: Sequence[float], style: str) -> str:
    """The mean, and where there are several values the least and the largest."""
    least, most = style.format(min(values)), style.format(max(values))
    return style.format(fmean(values)) + (f" ({least} to {most})" if least != most else "")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def into_page(page: Path, generated: str) -> None:
    """Put the tables between the page's two marks. Raises ValueError where it has none."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{page} lacks the lines {_BEGIN} and {_END}, between which the tables go")
    page.write_text(f"{before}{begin}\n\n{generated}\n\n{end}{after}", encoding="utf-8")


def plot(lines: Lines, path: Path) -> None:
    """Over student tokens: the mean over seeds, with all seeds within the band. Lines with fewer seeds are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: tuple[tuple[str, Callable[[Mapping[str, Any]], list[float]]], ...] = (
        ("recovered agreement on the teacher's answers, %", lambda line: [100 * value for value in recovered(line)]),
        ("KL to the teacher, nats a token", lambda line: [point["kl"] for point in line["points"]]),
        ("cross-entropy of reference answers, nats a token", lambda line: [point["nll"] for point in line["points"]]),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 5), layout="constrained")
    for axis, (title, measured) in zip(axes, panels, strict=True):
        for method in METHODS.values():
            _draw(axis, method, lines, measured)
        axis.set(title=title, xlabel="student tokens with a gradient")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize="small", ncols=3, loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axis: Any, method: Method, lines: Lines, measured: Callable[[Mapping[str, Any]], list[float]]) -> None:
    its = list(of_method(method, SEEDS, lines))
    label = f"{method.label}: {len(its)} of {len(SEEDS)} seeds" if its else f"{method.label}: {_NOT_RUN}"
    columns = list(zip(*(measured(line) for line in its), strict=True))
    x = [fmean(column) for column in zip(*([p["tokens"] for p in line["points"]] for line in its), strict=True)]
    style = "-" if len(its) == len(SEEDS) else "--"
    (line,) = axis.plot(x, [fmean(column) for column in columns], style, marker="o", markersize=3, label=label)
    low, high = [min(column) for column in columns], [max(column) for column in columns]
    axis.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
