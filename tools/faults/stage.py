"""Where a fault is played: a directory of its own, programs that fork from the warm process, and reference runs.

The run under test is the tests' small quickstart: four steps, a checkpoint after each, held-out prompts after every
second one, answers logged at every step. One rank runs without a launcher, two ranks run with one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import program
import psutil
import warm

INJECT = Path(__file__).with_name("inject.py")
RUN = (
    *("train.steps=4", "train.save_every=1", "train.eval_every=2", "log.completions_every=1"),
    f"data.eval=[{{name: add, path: {program.ROOT / 'tests/e2e/few.jsonl'}}}]",
)
END_S = 300.0
"""Tells an end from a hang, on a busy machine too."""
_MARK = "FAULT_STAGE"


class Running:
    """A program that runs. It prints into a pipe, as into a terminal: no limit of files keeps it from speaking."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        read, write = os.pipe()
        self.process = warm.start(arguments, env=environment, stdout=write, stderr=write)
        os.close(write)
        self._printed = ""
        self._reader = threading.Thread(target=self._read, args=(read,), daemon=True)
        self._reader.start()

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def wait(self, timeout: float) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        return self.process.wait(timeout)

    def printed(self) -> str:
        """Everything printed, once the process and all that write to the same pipe have ended, or a minute later."""
        self._reader.join(60)
        return self._printed

    def _read(self, descriptor: int) -> None:
        with open(descriptor, errors="replace") as pipe:
            for line in pipe:
                self._printed += line


@dataclass
class Ended:
    """How a program ended: exit code, everything it printed, and the seconds it took."""

    code: int | None
    """None: it did not end within END_S."""
    printed: str
    seconds: float


@dataclass
class Stage:
    """One injection's directory. `ranks` is 1 (the program is the rank) or 2 (there is a launcher)."""

    ranks: int
    dir: Path
    settings: tuple[str, ...] = RUN
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.run_dir, self.tmp, self.mark = self.dir / "run", self.dir / "tmp", self.dir / "happened"
        self.tmp.mkdir(parents=True)

    def start(self, *overrides: str, fault: dict[str, Any] | None = None) -> Running:
        """Start the run, or continue it; `fault` is for `inject`."""
        layout = f"parallel.tensor={self.ranks}"
        arguments = [*program.SMALL, layout, *self.settings, f"run.dir={self.run_dir}", *overrides]
        return self._start(["train", program.CONFIG, *arguments], fault)

    def command(self, *arguments: str) -> Ended:
        """Run another command to its end."""
        return self.end(self._start(list(arguments), None))

    def run(self, *overrides: str, fault: dict[str, Any] | None = None) -> Ended:
        """Run to the end, whatever it is."""
        return self.end(self.start(*overrides, fault=fault))

    def end(self, running: Running) -> Ended:
        """Wait for the end; a program that hangs is killed with all its processes."""
        began = time.monotonic()
        try:
            code = running.wait(END_S)
        except subprocess.TimeoutExpired:
            for left in self.processes():
                left.kill()
            return Ended(None, running.printed(), END_S)
        return Ended(code, running.printed(), time.monotonic() - began)

    def happened(self) -> bool:
        """Whether the injected fault has been reached."""
        return self.mark.exists()

    def processes(self) -> list[psutil.Process]:
        """All living processes of this stage, wherever they are in the tree."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        """A fork of the warm process has our directory among its arguments, and what it starts has our variable."""
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            ours = any(str(self.dir) in argument for argument in process.cmdline())
            return ours or process.environ().get(_MARK) == self.name
        except psutil.Error:
            return False

    def _start(self, arguments: list[str], fault: dict[str, Any] | None) -> Running:
        alone = program.ALONE if self.ranks == 1 else {}
        environment = program.environment(**alone, TMPDIR=str(self.tmp), **{_MARK: self.name})
        if fault is not None:
            environment["FAULT"] = json.dumps({**fault, "mark": str(self.mark)})
            environment["WARM_BEFORE"] = str(INJECT)
        return Running(["-m", "megatron_opd", *arguments], environment)

    def rank(self, number: int) -> psutil.Process | None:
        """The process of a rank that a launcher has started; it starts them in this order."""
        trainers = [process for process in self.processes() if "train" in process.cmdline()]
        in_order = sorted(trainers, key=lambda process: (process.create_time(), process.pid))
        return in_order[1 + number] if len(in_order) == 1 + self.ranks else None


@dataclass(frozen=True)
class Reference:
    """A run that nothing happened to."""

    run_dir: Path
    seconds: float
    """From its start to its end."""

    def before_export(self, stage: Stage) -> None:
        """Put a copy into the stage, without its export."""
        shutil.copytree(self.run_dir, stage.run_dir)
        shutil.rmtree(stage.run_dir / "hf")


@cache
def reference(ranks: int, settings: tuple[str, ...] = RUN) -> Reference:
    """The whole run on so many ranks; made once a process."""
    stage = Stage(ranks, Path(tempfile.mkdtemp(prefix=f"reference_{os.getpid()}_")), settings)
    ended = stage.run()
    if ended.code:
        raise RuntimeError(f"the run fails without any fault:\n{ended.printed}")
    return Reference(stage.run_dir, ended.seconds)
