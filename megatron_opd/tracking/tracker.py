"""Where metrics and messages go: metrics.jsonl and train.log always, the console, TensorBoard, Weights & Biases.

One JSON line per `log` call, floats in full precision, so that two runs can be compared bit by bit. Only the main rank
has sinks; on every other rank the same Tracker does nothing. Refuses to lose or repeat a step: after a resume `rewind`
drops the rows that the new run is going to write again.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from megatron_opd.config import LogConfig
from megatron_opd.tracking import json_lines, services
from megatron_opd.tracking.headline import Headline
from megatron_opd.tracking.phase import Phase
from megatron_opd.tracking.terminal import Terminal
from megatron_opd.tracking.train_log import LOG_FILE

METRICS_FILE = "metrics.jsonl"

_STEP, _TIME = services.STEP, "time_s"  # the two fields of a row that are not metrics


class Sink(Protocol):
    """One place that rows go to."""

    def log(self, row: Mapping[str, float], step: int) -> None: ...

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Show a table of equally keyed rows; most sinks show none."""
        ...

    def rewind(self, step: int) -> list[str]:
        """Forget every row after `step`; returns lines for the log."""
        ...

    def close(self) -> None: ...


class Tracker:
    """What the training loop sees. Without sinks and terminal (every rank but the main one) it does nothing."""

    def __init__(self, sinks: Sequence[Sink] = (), terminal: Terminal | None = None) -> None:
        self._terminal = terminal
        self._sinks: list[Sink] = [*sinks, *([terminal] if terminal else [])]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one row. The same step may get several rows (training, evaluation)."""
        if self._sinks:
            row = {name: float(value) for name, value in metrics.items()}
            for sink in self._sinks:
                sink.log(row, step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """A table of equally keyed rows, where a sink shows tables (Weights & Biases)."""
        for sink in self._sinks:
            sink.table(name, rows, step)

    def message(self, text: str) -> None:
        """One line for people, on the console and in train.log."""
        if self._terminal:
            self._terminal.message(text)

    @contextmanager
    def phase(self, what: str, *, total: int = 0, unit: str = "", is_told: bool = True) -> Iterator[Phase]:
        """Work of the block, shown on the console; the phase may be told of progress, of `total` units.

        train.log, and a console that is no terminal, get a line when it begins (`is_told`), and one at most every 30 s
        while it counts.
        """
        if self._terminal is None:
            yield Phase(what, total, unit, show=lambda _: None)
            return
        with self._terminal.phase(what, total=total, unit=unit, is_told=is_told) as phase:
            yield phase

    def show(self, headlines: Sequence[Headline]) -> None:
        """Metrics to put into the lines of steps and evaluations, besides those of every run."""
        if self._terminal:
            self._terminal.show(headlines)

    def begin(self, step: int) -> None:
        """Training goes on after `step`: from here on the time to go is estimated."""
        if self._terminal:
            self._terminal.begin(step)

    def rewind(self, step: int) -> None:
        """Drop every row after `step`; to be called on resume, and with -1 by a run that starts afresh."""
        for line in [line for sink in self._sinks for line in sink.rewind(step)]:
            self.message(line)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build_tracker(
    log: LogConfig, run_dir: Path, *, num_steps: int, settings: dict[str, Any], console: Console | None = None
) -> Tracker:
    """The tracker of the main rank; `settings` are those of the whole run, for sinks that show them.

    `console` defaults to stderr, so that stdout stays free for results.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    extra: list[Sink] = []  # made first: these may be refused, and then no file is left open
    if log.tensorboard:
        extra.append(services.TensorBoard(run_dir / "tensorboard"))
    if log.wandb != "off":
        extra.append(services.WeightsAndBiases(log, run_dir, settings))
    terminal = Terminal(run_dir / LOG_FILE, num_steps, console or Console(stderr=True))
    return Tracker([_JsonLines(run_dir / METRICS_FILE), *extra], terminal)


def console_alone() -> Tracker:
    """A tracker of work outside a run: phases on stderr, and nothing in files."""
    return Tracker(terminal=Terminal(Path(os.devnull), 0, Console(stderr=True)))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All rows of a metrics.jsonl, oldest first. An unfinished last line (a killed run) is not a row.

    Raises ValueError naming the line if any other line is not a row.
    """
    found = json_lines.parse(path.read_bytes(), _row)
    for number, line in found.damaged:
        raise ValueError(
            f"{path}:{number} is not a row of metrics: {line[:80].rstrip()!r}; take the line out (a run that is resumed"
            " does so itself)"
        )
    return [row for _, row in found.rows]


def _row(line: bytes) -> dict[str, float]:
    """Raises ValueError for what is no row of metrics."""
    row = json_lines.row(line)
    try:
        # float() also reads the strings that stand for NaN and the infinities.
        return {name: value if name == _STEP else float(value) for name, value in row.items()}
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None


class _JsonLines:
    """Appends rows to metrics.jsonl; each is in the file when `log` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._earlier_s = 0.0
        self._started = time.monotonic()
        self._unfinished = _cut_unfinished_line(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, row: Mapping[str, float], step: int) -> None:
        elapsed = self._earlier_s + time.monotonic() - self._started
        record = {_STEP: step, _TIME: round(elapsed, 3), **{name: _json_float(value) for name, value in row.items()}}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Rows of numbers only; completions have a file of their own."""

    def rewind(self, step: int) -> list[str]:
        """Keeps the bytes of the rows that stay, and makes `time_s` go on from the last of them."""
        self._file.close()
        kept, notes = json_lines.rewind(self._path, step, _row, unfinished=self._unfinished)
        self._unfinished = b""
        self._earlier_s = kept[-1].get(_TIME, 0.0) if kept else 0.0
        self._started = time.monotonic()
        self._file = self._path.open("a", encoding="utf-8")
        return notes + json_lines.missing(self._path, kept, step)

    def close(self) -> None:
        self._file.close()


def _cut_unfinished_line(path: Path) -> bytes:
    """Cut off, and return, what a killed run left after its last newline: the next row starts on a line of its own."""
    data = path.read_bytes() if path.exists() else b""
    unfinished = data[data.rfind(b"\n") + 1 :]
    if unfinished:
        os.truncate(path, len(data) - len(unfinished))
    return unfinished


def _json_float(value: float) -> float | str:
    """JSON has no NaN and no infinities: they become strings that float() reads back."""
    return value if math.isfinite(value) else str(value)
