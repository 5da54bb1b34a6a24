#!/usr/bin/env python3
"""Measure the host memory and the time of a checkpoint, on data-parallel ranks without a GPU.

    torchrun --nproc-per-node 2 tools/bench_checkpoint_memory.py
    torchrun --nproc-per-node 2 tools/bench_checkpoint_memory.py --by-megatron

A random student in bf16 is saved twice and restored. What is shown is by how much the rank that needs most went above
what it had before, in bytes a parameter, the seconds, and what each rank wrote. What the first save has freed, the
others use again, and it is not counted twice. `--by-megatron` makes the optimizer's state as Megatron does. On GPUs
that has a peak there too, which no CPU shows.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import tool
import torch

from megatron_opd import config as c
from megatron_opd.core.arguments import Parser
from megatron_opd.student import token_logps


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=tool.positive, default=512, metavar="N", help="(%(default)s)")
    parser.add_argument("--layers", type=tool.positive, default=8, metavar="N", help="(%(default)s)")
    parser.add_argument("--vocab", type=tool.positive, default=8192, metavar="N", help="(%(default)s)")
    parser.add_argument("--by-megatron", action="store_true", help="gather the optimizer's state as Megatron does")
    return tool.run(_run, parser.parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    parallel = token_logps.start_megatron(c.ParallelConfig(data=int(os.environ.get("WORLD_SIZE", "1"))))
    from megatron_opd.student import optimizer_state
    from megatron_opd.student.checkpoint import Checkpoints
    from megatron_opd.student.student import Student

    if arguments.by_megatron:
        optimizer_state.by_owners = lambda _: nullcontext()  # type: ignore[assignment]
    folder = parallel.share_world(tempfile.mkdtemp)
    parallel.share_world(lambda: _save_model(f"{folder}/model", arguments))
    config = c.Config(
        run=c.RunConfig(dir=folder),
        student=c.StudentConfig(model=f"{folder}/model", dtype="bf16"),
        teachers=[],
        data=c.DataConfig(train=[]),
        train=c.TrainConfig(steps=1),
    )
    student = Student(config, parallel)
    checkpoints = Checkpoints(folder, parallel, keep_last=1, verify=False)
    found = {}
    for what, work in {
        "first save": lambda: checkpoints.save(student, {"step": 1}),
        "save": lambda: checkpoints.save(student, {"step": 2}),
        "restore": lambda: checkpoints.restore(student),
    }.items():
        found[what] = parallel.gather_world(_measured(work))
    count = sum(p.numel() for p in student.gpt.parameters())
    if parallel.is_main:
        _show(found, count, Path(folder), parallel.world_size)
        shutil.rmtree(folder)
    return 0


def _save_model(folder: str, arguments: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config

    made = Qwen3Config(
        vocab_size=arguments.vocab, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
        head_dim=arguments.hidden // 4, num_hidden_layers=arguments.layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(folder)


def _measured(work: Callable[[], Any]) -> tuple[int, float]:
    """(bytes above what was there before at the worst moment, seconds) of this rank."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = _memory("VmRSS"), time.perf_counter()
    work()
    return _memory("VmHWM") - before, time.perf_counter() - started


def _memory(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def _show(found: dict[str, list[tuple[int, float]]], count: int, folder: Path, ranks: int) -> None:
    print(f"{count / 1e6:.1f} million parameters\n")
    print("| what | bytes a parameter, of the worst rank | seconds |", "|---|---:|---:|", sep="\n")
    for what, by_rank in found.items():
        print(f"| {what} | {max(peak for peak, _ in by_rank) / count:.1f} | {max(took for _, took in by_rank):.1f} |")
    for rank in range(ranks):
        written = sum(path.stat().st_size for path in folder.glob(f"checkpoints/*/__{rank}_*"))
        print(f"rank {rank} wrote {written / 1e6:.0f} MB")


if __name__ == "__main__":
    sys.exit(main())
