"""The comparison for people: one table by source, and one plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from teacher_comparison.cells import SOURCES, TEACHERS, Cell

_MISSING = "not run"
_COLUMNS = {
    **{f"KL to {teacher}": f"kl/{teacher}" for teacher in TEACHERS},
    **{f"agrees with {teacher}": f"agreement/{teacher}" for teacher in TEACHERS},
    **{f"forced, {teacher}": f"forced_agreement/{teacher}" for teacher in TEACHERS},
    "cross-entropy": "nll",
}
"""Names of columns, and their metrics."""

_LEGEND = """\
KL in nats a token and agreement in percent of tokens, on the model's own greedy answers. Forced: the share of tokens of
a teacher's greedy answers that are the model's likeliest. Cross-entropy of the reference answers, in nats a token.
Core seconds are those of the training."""

Lines = Mapping[str, Mapping[str, Any]]
"""Finished cells by name."""


def table(cells: Sequence[Cell], lines: Lines) -> None:
    """A row a cell and source."""
    made = Table(box=box.MARKDOWN)
    for name in ("", "source", *_COLUMNS, "core seconds"):
        made.add_column(name, no_wrap=name in ("", "source"), justify="left" if name in ("", "source") else "right")
    for cell in cells:
        line = lines.get(cell.name)
        for source in SOURCES:
            cells_of_row = [_MISSING] * len(_COLUMNS) if line is None else _row(line["metrics"][source])
            spent = f"{line['core_seconds']['train']:.0f}" if line is not None and source == SOURCES[0] else ""
            made.add_row(cell.label if source == SOURCES[0] else "", source, *cells_of_row, spent)
    Console(width=170).print(made)
    print(_LEGEND)


def _row(metrics: Mapping[str, float]) -> list[str]:
    return [_text(name, metrics[name]) if name in metrics else "-" for name in _COLUMNS.values()]


def _text(name: str, value: float) -> str:
    return f"{100 * value:.1f}" if "agreement" in name else f"{round(value, 3) + 0.0:.3f}"  # no -0.000


def plot(cells: Sequence[Cell], lines: Lines, path: Path) -> None:
    """A panel a source: KL to one teacher over KL to the other; the nearer to a corner, the more like both."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SOURCES), figsize=(11, 4.5), layout="constrained", squeeze=False)
    for axis, source in zip(axes[0], SOURCES, strict=True):
        for cell in cells:
            if (line := lines.get(cell.name)) is not None:
                metrics = line["metrics"][source]
                x, y = (metrics[f"kl/{teacher}"] for teacher in TEACHERS)
                axis.scatter([x], [y], marker="o" if cell.settings else "x", label=cell.label)
        titles = [f"KL to the {teacher}, nats a token" for teacher in TEACHERS]
        axis.set(title=source, xlabel=titles[0], ylabel=titles[1])
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
