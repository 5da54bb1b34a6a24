#!/usr/bin/env python3
"""Figures of the distillation loss: accuracy, time, memory, collectives, and how others do on the same inputs.

    python tools/bench_loss.py                                   # CPU, one thread; a table
    python tools/bench_loss.py --json loss.json --plot loss.png
    python tools/bench_loss.py --device cuda --json h100.json    # a GPU: builds, tests, measures, in a single call

TRL 1.16.0 and Liger 0.8.5 are measured where they are installed. All methods of a comparison take turns in one process,
on the same inputs; a ratio is the median over rounds, a time the best one. Exits with 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loss_bench import figures, measure, methods

_ROOT = Path(__file__).resolve().parents[1]
_TESTS_TIMEOUT_S = 300


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="at least N (default 5)")
    parser.add_argument("--no-compile", action="store_true", help="do not compile other implementations (a minute)")
    parser.add_argument("--no-tests", action="store_true", help="on a GPU: do not run the kernels' tests first")
    parser.add_argument("--keep-memory", action="store_true", help="keep freed pages, to time the arithmetic alone")
    parser.add_argument("--json", metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--plot", metavar="FILE", help="write a plot to this file")
    parser.add_argument("--memory", metavar="REQUEST", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.memory:
        print(figures.answer_memory(arguments.memory))
        return 0
    if arguments.keep_memory:
        measure.keep_memory()
    return _measure(arguments)


def _measure(arguments: argparse.Namespace) -> int:
    console = Console(width=120)
    missing = methods.missing()
    for method, why in missing.items():
        console.print(f"{method} is left out: {why}")
    peers = {*methods.LOGITS, *methods.LINEAR} - set(missing)
    if arguments.no_compile:
        peers.discard("Liger compiled")
    failed_tests = arguments.device == "cuda" and not arguments.no_tests and _test_on_gpu()
    started, found = time.monotonic(), []
    for figure in (figures.on_gpu if arguments.device == "cuda" else figures.on_cpu)(arguments.rounds, peers):
        found.append(figure)
        console.print(f"{time.monotonic() - started:5.0f} s  {figure.name}: {_number(figure.value)}{figure.unit}")
    console.print(_table(found))
    machine = _machine(arguments.device)
    console.print(machine)
    if arguments.json:
        rows = [{**asdict(f), "is_met": f.is_met} for f in found]
        Path(arguments.json).write_text(json.dumps({"machine": machine, "figures": rows}, indent=1) + "\n")
    if arguments.plot:
        _plot(found, arguments.plot, measure.clock(arguments.device))
    return int(failed_tests or not all(f.is_met for f in found))


def _test_on_gpu() -> bool:
    """Whether the tests of the kernels fail, compiled for this device."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/loss/fused/test_loss.py"]
    return bool(subprocess.run(command, cwd=_ROOT, timeout=_TESTS_TIMEOUT_S).returncode)


def _machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"one CPU thread, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def _table(found: list[figures.Figure]) -> Table:
    table = Table("figure", "goal", "measured", "")
    for f in found:
        goal = f"{'≥' if f.at_least else '≤'} {_number(f.goal)}{f.unit}"
        table.add_row(f.name, goal, f"{_number(f.value)}{f.unit}", "met" if f.is_met else "MISSED")
    return table


def _number(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3g}"


def _plot(found: list[figures.Figure], path: str, clock: str) -> None:
    """Time of every method, a group of bars a comparison."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, dict[str, float]] = {}
    for figure in found:
        by_method: dict[str, Any] = {m: t for m, t in figure.detail.items() if isinstance(t, dict) and clock in t}
        if len(by_method) > 1 and "ours" in by_method:
            groups[figure.name.split(":")[0]] = {m: t[clock] for m, t in by_method.items()}
    names = list(dict.fromkeys(m for group in groups.values() for m in group))
    canvas, axes = pyplot.subplots(figsize=(11, 5))
    for n, method in enumerate(names):
        heights = [group.get(method, 0.0) for group in groups.values()]
        axes.bar([i + n * 0.8 / len(names) for i in range(len(groups))], heights, 0.8 / len(names), label=method)
    axes.set_xticks([i + 0.4 for i in range(len(groups))], [g.replace(", ", "\n") for g in groups], fontsize=7)
    axes.set_yscale("log")
    axes.set_ylabel(f"ms, forward and backward ({clock.removesuffix('_ms')} time)")
    axes.legend(fontsize=8)
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
