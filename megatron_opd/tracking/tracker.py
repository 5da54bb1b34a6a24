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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megatron_opd.config import LogConfig
from megatron_opd.tracking import json_lines, services

METRICS_FILE = "metrics.jsonl"
LOG_FILE = "train.log"

_STEP, _TIME = services.STEP, "time_s"  # the two fields of a row that are not metrics

# Label and format of the few numbers shown for a training step; everything else is in metrics.jsonl.
_HEADLINES = {
    "loss": ("loss", "{:.4g}"),
    "grad_norm": ("grad", "{:.3g}"),
    "tokens_per_s": ("tok/s", "{:.0f}"),
}
_ACCURACY = "eval/accuracy/"
_EVAL_KL = "eval/kl/ensemble"


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

    def __init__(self, sinks: Sequence[Sink] = (), terminal: _Terminal | None = None) -> None:
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
    terminal = _Terminal(run_dir / LOG_FILE, num_steps, console or Console(stderr=True))
    return Tracker([_JsonLines(run_dir / METRICS_FILE), *extra], terminal)


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


class _Terminal:
    """The console and train.log: messages, one line per logged step, or a progress bar where there is a terminal."""

    def __init__(self, path: Path, num_steps: int, console: Console) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._num_steps = num_steps
        self._console = console
        self._progress: Progress | None = None
        self._first: tuple[int, float] | None = None
        self._accuracy = ""

    def log(self, row: Mapping[str, float], step: int) -> None:
        if any(name.startswith("eval/") for name in row):
            self._evaluation(row, step)
        if "loss" in row:
            self._training(row, step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Too wide for a log."""

    def message(self, text: str) -> None:
        self._write(text)
        self._print(text)

    def rewind(self, step: int) -> list[str]:
        self._first = None  # the pace before and after a resume are different things
        return []

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None
        self._file.close()

    def _training(self, row: Mapping[str, float], step: int) -> None:
        now = time.monotonic()
        self._first = self._first or (step, now)
        eta = _clock_time(self._remaining(step, now))
        parts = [f"{label} {form.format(row[name])}" for name, (label, form) in _HEADLINES.items() if name in row]
        line = "  ".join([f"step {step}/{self._num_steps}", *parts, f"eta {eta}"])
        self._write(line)
        if self._console.is_terminal:
            self._bar(step, "  ".join([*parts, *([self._accuracy] if self._accuracy else []), f"eta {eta}"]))
        else:
            self._print(line)

    def _evaluation(self, row: Mapping[str, float], step: int) -> None:
        accuracy = {name.removeprefix(_ACCURACY): value for name, value in row.items() if name.startswith(_ACCURACY)}
        parts = [f"{source} {value:.3f}" for source, value in accuracy.items()]
        if "all" in accuracy:
            self._accuracy = f"accuracy {accuracy['all']:.3f}"
        if _EVAL_KL in row:
            parts.append(f"kl {row[_EVAL_KL]:.4g}")
        if parts:
            self.message("  ".join([f"step {step}/{self._num_steps}", "eval", *parts]))

    def _bar(self, step: int, status: str) -> None:
        if self._progress is None:
            # No refresh thread: saving a checkpoint forks, and a fork while that thread holds its lock hangs.
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(24), TextColumn("{task.fields[status]}"))
            self._progress = Progress(*columns, console=self._console, auto_refresh=False)
            self._progress.add_task("train", total=self._num_steps, status="")
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=step, status=status, refresh=True)

    def _remaining(self, step: int, now: float) -> float | None:
        """Seconds to go at the mean pace since the first step of this process; None while there is no pace."""
        assert self._first is not None
        first_step, first_time = self._first
        if step <= first_step:
            return None
        return (now - first_time) / (step - first_step) * (self._num_steps - step)

    def _print(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')}  {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _write(self, text: str) -> None:
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
        self._file.flush()


def _clock_time(seconds: float | None) -> str:
    """h:mm:ss, or m:ss below an hour."""
    if seconds is None:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
