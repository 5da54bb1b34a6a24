"""Right is what is mathematically equal to the reference: numbers, expressions, sets, intervals, equations.

Reading and comparing are done by math-verify, in a process of its own with a time limit: its own limit works by
signals, which threads cannot use, and an answer such as 9^9^9^9 would keep a run from going on.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_opd.core.types import Prompt
from megatron_opd.rewards.base import Answer, Reward, needs_answer

_PROCESS = Path(__file__).with_name("math_process.py")
_START_S, _ANSWER_S = 300.0, 10.0
_MOST_CHARACTERS = 10_000
"""An answer's end, which is where it stands."""
_MOST_IN_A_NUMBER = 500


class Reader:
    """A process that reads mathematics; it is started when it is first asked, and again when it took too long."""

    def __init__(self, answer_s: float = _ANSWER_S) -> None:
        self.answer_s = answer_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()

    def ask(self, what: str, **about: str) -> Any:
        """What math_process.py says; None where it says nothing in time. Threads take turns."""
        with self._lock:
            if self._process is None:
                self._start()
            try:
                self._process.stdin.write(json.dumps({"what": what, **about}) + "\n")
                self._process.stdin.flush()
                return json.loads(self._lines.get(timeout=self.answer_s))["said"]
            except (queue.Empty, OSError, ValueError):
                self._stop()
                return None

    def _start(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-I", _PROCESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._process, self._lines = process, queue.Queue()
        threading.Thread(target=_read, args=(process, self._lines), name="math-verify", daemon=True).start()
        try:
            json.loads(self._lines.get(timeout=_START_S))
        except (queue.Empty, ValueError):
            self._stop()
            raise ValueError("math-verify could not be started: python -c 'import math_verify' says why") from None

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()


def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    for line in process.stdout:
        lines.put(line)
    lines.put("")  # the end, which is no message
    process.stdout.close()


def reader() -> Reader:
    """This process's reader."""
    return _reader_of(os.getpid())


@functools.cache
def _reader_of(process: int) -> Reader:
    return Reader()  # one for each process: a forked one must not share its parent's pipes


def number(expression: str) -> Fraction | None:
    """The value of a LaTeX expression that is a rational number, else None."""
    if len(expression) > _MOST_IN_A_NUMBER:
        return None
    said = reader().ask("number", text=expression)
    return Fraction(said) if said else None


def build() -> Reward:
    """The reward. Raises ValueError when math-verify is not installed."""
    if find_spec("math_verify") is None:
        raise ValueError("the reward math needs math-verify: pip install math-verify")
    return Reward(name="math", grade=_grade, check=_check)


def _grade(answers: Sequence[Answer]) -> list[float]:
    return [_one(prompt.answer or "", text) for prompt, text in answers]


def _one(reference: str, text: str) -> float:
    if not text.strip():
        return 0.0
    return float(reader().ask("is_right", reference=reference, text=text[-_MOST_CHARACTERS:]) is True)


def _check(prompt: Prompt) -> None:
    reference = needs_answer(prompt)
    if len(reference) > _MOST_CHARACTERS or not reader().ask("is_readable", reference=reference):
        raise ValueError('the reward math needs mathematics in "answer", such as a number or a LaTeX expression')
