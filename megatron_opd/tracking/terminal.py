"""The console and train.log: messages, phases, one line a step, and on a terminal a bar in place of these.

No thread of its own draws the bar: a fork while that thread holds its lock would hang the forked process, and a picture
could get between lines that somebody else writes. Other threads may tell of progress while the main one waits for them
in a phase; what is shown then is over before it goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from megatron_opd.tracking.headline import BEFORE, BEHIND, HELD_OUT, Headline
from megatron_opd.tracking.phase import Phase, clock_time
from megatron_opd.tracking.train_log import for_console, for_file

PLAIN_S = 30.0
"""Seconds between lines about one phase, where there is no bar and in train.log."""
_REFRESH_S = 0.1
"""Least seconds between two pictures of a phase on a terminal."""
_ACCURACY = "eval/accuracy/all"


class Terminal:
    """The lines and the bar of a run. A sink of the tracker."""

    def __init__(self, path: Path, num_steps: int, console: Console) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._num_steps = num_steps
        self._console = console
        self._bar = _Bar(console, num_steps) if console.is_terminal else None
        self._first: tuple[int, float] | None = None
        self._accuracy = ""
        self._shown: tuple[Headline, ...] = ()
        self._phases: list[Phase] = []
        self._told_at = 0.0
        self._lock = threading.RLock()

    def show(self, headlines: Sequence[Headline]) -> None:
        """Metrics of steps and evaluations to put into lines, besides those of every run."""
        self._shown = tuple(headlines)

    def begin(self, step: int) -> None:
        """Training goes on after `step`: the pace counts from now."""
        self._first = step, time.monotonic()

    def log(self, row: Mapping[str, float], step: int) -> None:
        """A line about a row of metrics."""
        if any(name.startswith("eval/") for name in row):
            self._evaluation(row, step)
        if "loss" in row:
            self._training(row, step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Too wide for a log."""

    def message(self, text: str) -> None:
        """A line."""
        with self._lock:
            self._write(text)
            self._print(text)

    @contextmanager
    def phase(self, what: str, *, total: int, unit: str, is_told: bool) -> Iterator[Phase]:
        """Work of the block. `is_told`: a line says that it begins; otherwise only if it takes long."""
        phase = Phase(what, total, unit, show=self._progress)
        with self._lock:
            self._phases.append(phase)
            self._told_at = phase.began
            if is_told:
                self._tell(f"{what} ({total} {unit})" if total else what)
            self._draw()
        try:
            yield phase
            with self._lock:
                seconds = phase.seconds(time.monotonic())
                if seconds >= PLAIN_S:
                    self._tell(f"{what}: done in {clock_time(seconds)}")
        finally:
            with self._lock:
                self._phases.remove(phase)
                self._draw()

    def rewind(self, step: int) -> list[str]:
        """The pace before and after a resume are different things."""
        self._first = None
        return []

    def close(self) -> None:
        """End the bar and the file."""
        if self._bar:
            self._bar.stop()
        self._file.close()

    def _training(self, row: Mapping[str, float], step: int) -> None:
        now = time.monotonic()
        self._first = self._first or (step, now)
        remaining = self._remaining(step, now)
        eta = f"eta {'-' if remaining is None else clock_time(remaining)}"
        parts = [text for headline in (*BEFORE, *self._shown, *BEHIND) for text in headline.texts(row)]
        with self._lock:
            self._tell("  ".join([f"step {step}/{self._num_steps}", *parts, eta]))
            if self._bar:
                # The time first: a narrow terminal cuts the end.
                self._bar.step(step, "  ".join([eta, *parts, *([self._accuracy] if self._accuracy else [])]))

    def _evaluation(self, row: Mapping[str, float], step: int) -> None:
        declared = [headline for headline in self._shown if headline.metric.startswith("eval/")]
        shown = {headline.metric: headline for headline in (*HELD_OUT, *declared)}
        parts = [text for headline in shown.values() for text in headline.texts(row)]
        if _ACCURACY in row:
            self._accuracy = f"accuracy {row[_ACCURACY]:.3f}"
        if parts:
            self.message("  ".join([f"step {step}/{self._num_steps}", "eval", *parts]))

    def _remaining(self, step: int, now: float) -> float | None:
        """Seconds to go at the mean pace since this process began to train; None while there is no pace."""
        assert self._first is not None
        first_step, first_time = self._first
        if step <= first_step:
            return None
        return (now - first_time) / (step - first_step) * (self._num_steps - step)

    def _progress(self, phase: Phase) -> None:
        """From any thread."""
        with self._lock:
            if phase not in self._phases:
                return
            now = time.monotonic()
            if now - self._told_at >= PLAIN_S:
                self._told_at = now
                self._tell(phase.text(now))
            self._draw(at_least_s=_REFRESH_S)

    def _draw(self, at_least_s: float = 0.0) -> None:
        if self._bar:
            self._bar.phase(self._phases[-1:], time.monotonic(), at_least_s)

    def _tell(self, text: str) -> None:
        """A line for train.log, and for a console without a bar, which would show the same."""
        self._write(text)
        if not self._bar:
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(for_console(text), markup=False, highlight=False, soft_wrap=True)

    def _write(self, text: str) -> None:
        self._file.write(for_file(text))
        self._file.flush()


class _Bar:
    """The last lines of a terminal: steps with their numbers, and the phase below."""

    def __init__(self, console: Console, num_steps: int) -> None:
        numbers = TextColumn("{task.fields[status]}", markup=False)  # names of sources and teachers may have brackets
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(24), numbers)
        self._steps = Progress(*columns, console=console, auto_refresh=False)
        self._task = self._steps.add_task("train", total=num_steps, status="", visible=False)
        self._phase = ""
        self._drawn_at = 0.0
        self._live = Live(get_renderable=self._picture, console=console, auto_refresh=False)

    def step(self, step: int, status: str) -> None:
        """A step is done."""
        self._steps.update(self._task, completed=step, status=status, visible=True)
        self._refresh()

    def phase(self, phases: Sequence[Phase], now: float, at_least_s: float) -> None:
        """The one phase that is under way, if there is one; not drawn again before `at_least_s` seconds are over."""
        self._phase = "".join(phase.text(now) for phase in phases)
        if now - self._drawn_at >= at_least_s:
            self._drawn_at = now
            self._refresh()

    def stop(self) -> None:
        """Leave the picture, and show the cursor."""
        self._live.stop()

    def _refresh(self) -> None:
        if not self._live.is_started:
            self._live.start()
        self._live.refresh()

    def _picture(self) -> RenderableType:
        phase = [Text(self._phase, no_wrap=True, overflow="ellipsis")] if self._phase else []
        return Group(self._steps, *phase)
