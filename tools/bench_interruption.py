#!/usr/bin/env python3
"""Measure how soon a run ends: seconds from a signal, or a rank's death, to the end of the launcher.

The quickstart runs on two ranks. Tests only ask that a run ends; how soon it does is read here, on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import tool
from rich.console import Console
from rich.table import Table

_ROOT = Path(__file__).resolve().parents[1]
_EXAMPLES = """\
examples:
  python tools/bench_interruption.py                    each way of ending a run, three times
  python tools/bench_interruption.py --times 1 --json found.json
"""
_TIMEOUT_S = 600.0
_ENDLESS = ("train.steps=100000", "train.save_every=0", "train.eval_every=0")
_OVERRIDES = ("parallel.tensor=2", "parallel.pipeline=1", *_ENDLESS)
_COMMAND = (sys.executable, "-m", "megatron_opd", "train", "examples/quickstart.yaml")


def _rank_1_dies(launcher: psutil.Process) -> None:
    ranks = [child for child in launcher.children() if "train" in child.cmdline()]
    next(rank for rank in ranks if rank.environ().get("RANK") == "1").kill()


WAYS: dict[str, Callable[[psutil.Process], None]] = {
    "SIGTERM": lambda launcher: launcher.send_signal(signal.SIGTERM),
    "SIGINT": lambda launcher: launcher.send_signal(signal.SIGINT),
    "SIGUSR1 (saves first)": lambda launcher: launcher.send_signal(signal.SIGUSR1),
    "rank 1 dies": _rank_1_dies,
}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Measure the seconds from a signal to the end of a run.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--times", type=tool.positive, default=3, metavar="N", help="how often each (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the seconds there")
    return tool.run(_measure, parser.parse_args(argv))


def _measure(arguments: argparse.Namespace) -> int:
    found = {name: [_seconds(end) for _ in range(arguments.times)] for name, end in WAYS.items()}
    table = Table("ended by", "median s", "longest s")
    for name, seconds in found.items():
        table.add_row(name, f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


def _seconds(end: Callable[[psutil.Process], None]) -> float:
    """From `end` to the end of a run that has made three steps. Raises ValueError when the run does not get there."""
    with tempfile.TemporaryDirectory() as run_dir, tempfile.TemporaryFile("w+") as said:
        command = [*_COMMAND, *_OVERRIDES, f"run.dir={run_dir}"]
        launcher = subprocess.Popen(command, cwd=_ROOT, stdout=said, stderr=said, start_new_session=True)
        try:
            if not _comes_to_step(3, Path(run_dir) / "metrics.jsonl", launcher):
                said.seek(0)
                raise ValueError(f"the run did not come to step 3. It said last:\n{said.read()[-2000:]}")
            begun = time.perf_counter()
            end(psutil.Process(launcher.pid))
            launcher.wait(_TIMEOUT_S)
            return time.perf_counter() - begun
        finally:
            launcher.kill()
            launcher.wait()


def _comes_to_step(step: int, metrics: Path, launcher: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + _TIMEOUT_S
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < step:
        if launcher.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


if __name__ == "__main__":
    sys.exit(main())
