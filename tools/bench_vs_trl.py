#!/usr/bin/env python3
"""On-policy distillation by TRL's DistillationTrainer and by this trainer (one rank), side by side on a CPU.

Both get the same random models, prompts, lengths and batch, sample every answer from the student with its full length
(no end of sequence), minimise the full-vocabulary reverse KL to one teacher in float32, and step AdamW. They run in
turn, each time in a fresh process: samples a second are those of the steps after the warm-up, by the clock and by
the time of the CPU (which compares on a busy machine too), memory is the largest resident size above that after
importing everything. The two losses are means over steps that hardly move the student
(a tiny learning rate), so they estimate the same number.

TRL lives in an environment of its own that borrows this one's packages (torch and transformers are the same files);
--python names another. It is made at first use, in --env, and holds TRL and accelerate only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Any

import tool
from rich.console import Console
from rich.table import Table
from trl_bench.inputs import make

_PINNED = ("trl==1.16.0", "accelerate==1.15.0")
_TIMEOUT_S = 1800
_EXAMPLES = """\
examples:
  python tools/bench_vs_trl.py                                  three rounds with the default models, on one core
  python tools/bench_vs_trl.py --rounds 5 --json trl.json
  python tools/bench_vs_trl.py --vocab 256 --hidden 32 --layers 1 --steps 1 --warmup 0 --rounds 1   as small as it gets
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = parser.add_argument_group("models", "Qwen3-like, random, student and a teacher of twice its width")
    models.add_argument("--vocab", type=tool.positive, default=32768, metavar="N")
    models.add_argument("--hidden", type=tool.positive, default=256, metavar="N", help="student size (%(default)s)")
    models.add_argument("--layers", type=tool.positive, default=4, metavar="N")
    work = parser.add_argument_group("work")
    work.add_argument("--batch", type=tool.positive, default=8, metavar="N", help="answers per step (%(default)s)")
    work.add_argument("--prompt", type=tool.positive, default=32, metavar="TOKENS")
    work.add_argument("--response", type=tool.positive, default=96, metavar="TOKENS")
    work.add_argument("--steps", type=tool.positive, default=4, metavar="N", help="timed steps (%(default)s)")
    work.add_argument("--warmup", type=int, default=4, metavar="N", help="steps before timing (%(default)s)")
    work.add_argument("--rounds", type=tool.positive, default=3, metavar="N", help="runs of each (%(default)s)")
    work.add_argument(
        "--core", type=int, default=None, metavar="N", help="pin both to this core (the first allowed one)"
    )
    parser.add_argument("--env", default=".venv-trl", metavar="DIR", help="TRL's environment (%(default)s)")
    parser.add_argument("--python", help="Python of an environment with TRL, instead of --env")
    parser.add_argument("--json", metavar="FILE", help="write every run's figures")
    return tool.run(_run, parser.parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    pythons = {"TRL": arguments.python or _environment(Path(arguments.env).absolute()), "ours": sys.executable}
    core = min(os.sched_getaffinity(0)) if arguments.core is None else arguments.core
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), arguments)
        for number in range(arguments.rounds):
            for name in sorted(pythons, reverse=bool(number % 2)):
                runs[name].append(_measure(name, pythons[name], folder, core))
                last = runs[name][-1]
                rates = f"{last['samples_per_s']:.3f} samples/s, {last['samples_per_cpu_s']:.3f} samples/CPU s"
                print(f"round {number + 1}: {name}: {rates}", file=sys.stderr, flush=True)
                _write(arguments, runs)
    _show(runs, arguments, core)
    return 0


def _write(arguments: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> None:
    """After every run, so that an interruption loses one."""
    if arguments.json:
        told = {key: value for key, value in vars(arguments).items() if key not in ("python", "env", "json")}
        Path(arguments.json).write_text(json.dumps({"settings": told, "runs": runs}, indent=2) + "\n")


def _environment(folder: Path) -> str:
    """Python of an environment with TRL on top of this one's packages; made where it is not there."""
    python = folder / "bin" / "python"
    site = folder / "lib" / f"python{platform.python_version().rpartition('.')[0]}" / "site-packages"
    if (site / "trl").is_dir():
        return str(python)
    print(f"making {folder}: {' '.join(_PINNED)}", file=sys.stderr, flush=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=300)
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        subprocess.run([*pip, "--no-deps", "--target", str(site), *_PINNED], check=True, timeout=600)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{folder} could not be made: {error}; name an environment with --python") from None
    return str(python)


def _measure(name: str, python: str, folder: str, core: int) -> dict[str, Any]:
    """One run in a process of its own, on one core with one thread."""
    program = Path(__file__).parent / "trl_bench" / ("of_trl.py" if name == "TRL" else "of_ours.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = ["taskset", "-c", str(core), python, str(program), folder]
    return tool.told_by(name, command, environment=environment, folder=folder, timeout_s=_TIMEOUT_S)


def _show(runs: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace, core: int) -> None:
    table = Table(title="On-policy distillation, one core: median (all runs)", title_justify="left", title_style="bold")
    columns = ["samples/s", "samples/CPU s", "sampling, s a step", "peak memory, MB above import", "loss"]
    for i, column in enumerate(["", *columns]):
        table.add_column(column, justify="right" if i else "left")
    for name, found in runs.items():
        losses = [loss for run in found for loss in run["losses"]]
        cells = [
            _cell(found, "samples_per_s", 3),
            _cell(found, "samples_per_cpu_s", 3),
            _cell(found, "generate_s", 2),
            _cell(found, "peak_mb", 0),
        ]
        table.add_row(name, *cells, f"{fmean(losses):.4f} [{min(losses):.4f}, {max(losses):.4f}]")
    Console(width=160).print(table)
    ratios = {
        key: median(run[key] for run in runs["ours"]) / median(run[key] for run in runs["TRL"])
        for key in ("samples_per_s", "samples_per_cpu_s", "peak_mb")
    }
    print(
        f"ours / TRL: {ratios['samples_per_s']:.2f}x samples a second, {ratios['samples_per_cpu_s']:.2f}x samples a CPU"
        f" second, {ratios['peak_mb']:.2f}x memory"
    )
    print(
        f"{arguments.batch} answers a step of {arguments.prompt} + {arguments.response} tokens, vocabulary"
        f" {arguments.vocab}, float32, core {core}, {arguments.rounds} rounds of {arguments.steps} steps each"
    )


def _cell(runs: list[dict[str, Any]], key: str, digits: int) -> str:
    values = [run[key] for run in runs]
    return f"{median(values):.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in values)})"


if __name__ == "__main__":
    sys.exit(main())
