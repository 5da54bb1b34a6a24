#!/usr/bin/env python3
"""Measure the host memory and the time of a checkpoint, on data-parallel ranks without a GPU.

    python tools/bench_checkpoint_memory.py MODEL
    torchrun --nproc-per-node 2 tools/bench_checkpoint_memory.py [MODEL] [--by-megatron]

The student, from a Hugging Face directory or a random one, makes a step, is saved twice, restored and exported. What is
shown is by how much the rank that needs most went above what it had before, in bytes a parameter and as a share of the
checkpoint, what was left of that afterwards, and the seconds; then what each rank wrote. `--by-megatron` makes the
optimizer's state as Megatron does. On GPUs that has a peak there too, which no CPU shows.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tool
import torch

from megatron_opd import config as c
from megatron_opd.core import process_memory
from megatron_opd.core.arguments import Parser
from megatron_opd.core.named_weights import drain
from megatron_opd.models import hf_dir
from megatron_opd.planner.gpus import BYTES
from megatron_opd.student import token_logps


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes of a rank, and seconds."""

    before: int
    peak: int
    """Above that."""
    left: int
    """Above that, afterwards."""
    seconds: float


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="", metavar="MODEL", help="Hugging Face directory of the student")
    parser.add_argument("--dtype", choices=BYTES, default="fp32", help="type of its weights (%(default)s)")
    parser.add_argument("--hidden", type=tool.positive, default=512, metavar="N", help="of a random one (%(default)s)")
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
    try:
        if not arguments.model:
            parallel.share_world(lambda: _save_model(f"{folder}/model", arguments))
        config = c.Config(
            run=c.RunConfig(dir=folder),
            student=c.StudentConfig(model=arguments.model or f"{folder}/model", dtype=arguments.dtype),
            teachers=[],
            data=c.DataConfig(train=[]),
            train=c.TrainConfig(steps=1),
        )
        student = Student(config, parallel)
        _step(student)
        checkpoints = Checkpoints(folder, parallel, keep_last=1)
        found = {}
        for what, work in {
            "first save": lambda: checkpoints.save(student, {"step": 1}),
            "save": lambda: checkpoints.save(student, {"step": 2}),
            "restore": lambda: checkpoints.restore(student),
            "export": lambda: _export(student, f"{folder}/hf"),
        }.items():
            found[what] = parallel.gather_world(_measured(work))
        if parallel.is_main:
            count = sum(p.numel() for p in student.gpt.parameters())
            _show(found, count, Path(folder), parallel.world_size)
    finally:
        parallel.share_world(lambda: shutil.rmtree(folder))
    return 0


def _step(student: Any) -> None:
    """One of the optimizer's, by random gradients: only then does it have all of its state."""
    from megatron_opd.student import optim

    for parameter in student.gpt.parameters():
        parameter.main_grad.normal_()
    optim.step(student.optimizer)


def _export(student: Any, out: str) -> None:
    weights = student.export()
    if student.parallel.is_main:
        hf_dir.write(weights, out, like=student.path)
    else:
        drain(weights)


def _save_model(folder: str, arguments: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config

    made = Qwen3Config(
        vocab_size=arguments.vocab, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
        head_dim=arguments.hidden // 4, num_hidden_layers=arguments.layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(folder)


def _measured(work: Callable[[], Any]) -> Measured:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = process_memory.resident(), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - started, process_memory.resident()
    return Measured(before, process_memory.peak() - before, after - before, seconds)


def _show(found: dict[str, list[Measured]], count: int, folder: Path, ranks: int) -> None:
    written = [sum(path.stat().st_size for path in folder.glob(f"checkpoints/*/__{r}_*")) for r in range(ranks)]
    before = max(one.before for by_rank in found.values() for one in by_rank)
    print(f"{count / 1e6:.1f} million parameters; a rank has {before / 1e9:.2f} GB at most before a save;", end=" ")
    print(f"the checkpoint has {sum(written) / 1e9:.2f} GB, {sum(written) / count:.1f} bytes a parameter\n")
    print("| what | peak above before, MB | bytes a parameter | of the checkpoint | left, MB | seconds |")
    print("|---|---:|---:|---:|---:|---:|")
    for what, by_rank in found.items():
        peak, left = max(one.peak for one in by_rank), max(one.left for one in by_rank)
        share = f"{peak / count:.1f} | {100 * peak / sum(written):.0f} %"
        seconds = max(one.seconds for one in by_rank)
        print(f"| {what} | {peak / 1e6:.0f} | {share} | {left / 1e6:.0f} | {seconds:.1f} |")
    for rank, size in enumerate(written):
        print(f"rank {rank} wrote {size / 1e6:.0f} MB")


if __name__ == "__main__":
    sys.exit(main())
