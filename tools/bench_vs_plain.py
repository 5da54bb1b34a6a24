#!/usr/bin/env python3
"""This trainer (one rank) and a plain loop of transformers, side by side with a real model on a CPU.

The model distils itself, so nothing is learned and everything is computed: both sample the same number of tokens to the
same prompts (no end of sequence), score them, and take a step by reverse KL over the whole vocabulary, in float32. They
run in turn, each time in a fresh process on the same cores. Seconds are CPU seconds, means of the steps after the
warm-up; ratios are medians of those of the rounds. Below them: `mismatch/kl`, the distance of the sampler to the
trained model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

import tool
from rich.console import Console
from rich.table import Table

_TIMEOUT_S = 3600
_ROOT = Path(__file__).resolve().parents[1]
_EXAMPLES = """\
examples:
  python tools/fetch_smollm2.py models/SmolLM2-135M-Instruct
  python tools/bench_vs_plain.py models/SmolLM2-135M-Instruct                  16 prompts of GSM8K, 32 tokens each
  python tools/bench_vs_plain.py models/SmolLM2-135M-Instruct --batch 64 --json plain.json
  python tools/bench_vs_plain.py models/SmolLM2-135M-Instruct --generate-only --bf16
"""
_PLAIN, _OURS, _BF16 = "plain loop", "ours", "ours, rollout.dtype bf16"
_FIGURES = ("generate", "score", "step", "whole step", "peak", "mismatch/kl")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tool.add_model_and_prompts(parser)
    parser.add_argument("--batch", type=tool.positive, default=16, metavar="N", help="answers a step (%(default)s)")
    parser.add_argument("--response", type=tool.positive, default=32, metavar="TOKENS", help="each (%(default)s)")
    parser.add_argument(
        "--micro", type=tool.positive, default=4, metavar="N", help="answers a micro-batch (%(default)s)"
    )
    parser.add_argument("--steps", type=tool.positive, default=2, metavar="N", help="timed steps (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="steps before timing (%(default)s)")
    parser.add_argument("--rounds", type=tool.positive, default=2, metavar="N", help="runs of each (%(default)s)")
    parser.add_argument("--threads", type=tool.positive, default=1, metavar="N", help="cores of either (%(default)s)")
    parser.add_argument("--generate-only", action="store_true", help="sample, and neither score nor train")
    parser.add_argument("--bf16", action="store_true", help="a third run, with rollout.dtype bf16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's figures")
    return tool.run(_run, parser.parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    if not (arguments.model / "config.json").is_file():
        raise ValueError(f"{arguments.model} holds no model; tools/fetch_smollm2.py gets one")
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    runs: dict[str, list[dict[str, float]]] = {_PLAIN: [], _OURS: [], **({_BF16: []} if arguments.bf16 else {})}
    with tempfile.TemporaryDirectory() as folder:
        names = ("batch", "response", "micro", "steps", "warmup", "threads", "generate_only")
        settings = {name: getattr(arguments, name) for name in names} | {"lr": 1e-7}
        settings |= {"model": str(arguments.model.resolve()), "prompts": str(Path(folder) / "prompts.jsonl")}
        # As many as are used: this trainer draws them in another order than the file's.
        rows = arguments.prompts.read_text().splitlines(keepends=True)
        (Path(folder) / "prompts.jsonl").write_text(
            "".join(rows[: arguments.batch * (arguments.steps + arguments.warmup)])
        )
        (Path(folder) / "settings.json").write_text(json.dumps(settings))
        for number in range(arguments.rounds):
            for name in sorted(runs, reverse=bool(number % 2)):
                runs[name].append(_measure(name, folder, cores))
                print(f"round {number + 1}: {name}: {_line(runs[name][-1])}", file=sys.stderr, flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps({"settings": settings, "runs": runs}, indent=2) + "\n")
    tokens = {run["prompt tokens"] for its in runs.values() for run in its}
    if len(tokens) > 1:
        raise ValueError(f"the programs read other prompts: {sorted(tokens)} tokens")
    _show(runs, settings)
    return 0


def _measure(name: str, folder: str, cores: list[int]) -> dict[str, float]:
    """One run in a process of its own."""
    programs = {_PLAIN: ["of_plain.py"], _OURS: ["of_ours.py", "fp32"], _BF16: ["of_ours.py", "bf16"]}
    program, *more = programs[name]
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores)), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1"}
    command = [
        "taskset",
        "-c",
        ",".join(map(str, cores)),
        sys.executable,
        str(Path(__file__).parent / "plain_bench" / program),
    ]
    return tool.told_by(name, [*command, folder, *more], environment=environment, folder=folder, timeout_s=_TIMEOUT_S)


def _line(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {_text(name, found[name])}" for name in _FIGURES if name in found)


def _text(name: str, value: float) -> str:
    if name == "mismatch/kl":
        return f"{value:.1e}"
    return tool.gigabytes(value) if name == "peak" else f"{value:.2f} s"


def _ratio(ours: list[dict[str, float]], plain: list[dict[str, float]], figure: str) -> str:
    """The median over rounds, in which both ran one after the other."""
    if figure not in plain[0]:
        return ""
    return f"{median(our[figure] / its[figure] for our, its in zip(ours, plain, strict=True)):.2f}"


def _show(runs: dict[str, list[dict[str, float]]], settings: dict[str, object]) -> None:
    title = "A step of {batch} answers of {response} tokens, cores: {threads}; medians".format(**settings)
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    others = [name for name in runs if name != _PLAIN]
    for name in (*runs, *(f"{name} / {_PLAIN}" for name in others)):
        table.add_column(name, justify="right")
    hidden = ("whole step", "peak") if settings["generate_only"] else ()  # ours has an optimizer all the same
    for figure in (name for name in _FIGURES if name not in hidden):
        cells = [_text(figure, median(run[figure] for run in its)) if figure in its[0] else "" for its in runs.values()]
        ratios = [_ratio(runs[name], runs[_PLAIN], figure) for name in others]
        if any(cells):
            table.add_row(figure, *cells, *ratios)
    Console(width=150).print(table)


if __name__ == "__main__":
    sys.exit(main())
