"""What the tools in this folder share: errors as one line, progress with an ETA, and ranks under torchrun.

A tool is a function from parsed arguments to an exit code; `run` calls it. Errors of users are `ValueError` or
`OSError` and end with exit code 1 and one line on stderr; under torchrun rank 0 says them for all.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_opd.config import ParallelConfig
from megatron_opd.models.architecture import Architecture, check_layout

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_M_MMAP_THRESHOLD = -3  # as in malloc.h
_LINE_EVERY_S = 5.0
"""Time between lines of progress where there is no terminal."""


def add_model_and_prompts(parser: argparse.ArgumentParser) -> None:
    """The arguments `model` and `--prompts` of a tool that samples a real model."""
    prompts = Path(__file__).resolve().parents[1] / "examples/llm/data/gsm8k.eval.jsonl"
    parser.add_argument("model", type=Path, help="a Hugging Face directory with a chat template")
    parser.add_argument(
        "--prompts", type=Path, default=prompts, metavar="FILE", help="JSON lines (GSM8K's held-out rows)"
    )


def run(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """The tool's exit code, with errors said in one line."""
    before = signal.signal(signal.SIGTERM, _stop)  # so that half-made output is removed
    _give_memory_back()
    warnings.filterwarnings("ignore", module=r"(torch|megatron)\..*")
    try:
        return command(arguments)
    except BrokenPipeError:  # the reader of our output has seen enough, like `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if is_main():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)
        if dist.is_initialized():
            dist.destroy_process_group()


def _stop(number: int, _: object) -> None:
    sys.exit(128 + number)


def _give_memory_back() -> None:
    """Let glibc return every large tensor to the system when it is freed: by default it learns to keep them, and a long
    conversion then grows by the holes between them."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def is_main() -> bool:
    """Whether this is the process that talks."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_ranks() -> None:
    """Under torchrun, let the ranks share the work (over gloo: nothing here needs a GPU)."""
    if world_size() > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=30))


def add_layout(parser: argparse.ArgumentParser, purpose: str) -> None:
    """--tp, --pp, --ep."""
    group = parser.add_argument_group("layout", purpose)
    for name, meaning in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        group.add_argument(f"--{name}", type=positive, default=1, metavar="N", help=f"{meaning}-parallel size")


def layout(arguments: argparse.Namespace, arch: Architecture, *, data: int = 1) -> ParallelConfig:
    """The layout of --tp, --pp and --ep. Raises ValueError when the model does not fit it."""
    made = ParallelConfig(
        tensor=arguments.tp,
        pipeline=arguments.pp,
        data=data,
        expert=arguments.ep,
        sequence=bool(arch.num_experts) and arguments.tp > 1,
    )
    problems = check_layout(arch, made, what="the model")
    if problems:
        text = "\n".join(problems)
        for setting, option in (("tensor", "--tp"), ("pipeline", "--pp"), ("expert", "--ep")):
            text = text.replace(f"parallel.{setting}=", f"{option} ").replace(f"parallel.{setting}", option)
        raise ValueError(text)
    return made


def positive(text: str) -> int:
    """For argparse: a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return value


def gigabytes(num_bytes: float) -> str:
    """A size for people."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def told_by(
    name: str, command: Sequence[str], *, environment: Mapping[str, str], folder: str, timeout_s: float
) -> dict[str, Any]:
    """The figures that a program prints as JSON on its last line. It runs in a process of its own, in `folder`.

    Raises ValueError where the program fails, or takes longer than `timeout_s`.
    """
    how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": timeout_s, "cwd": folder, "check": False}
    try:
        done = subprocess.run(command, env=dict(environment), **how)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{name} took more than {timeout_s:g} s; ask for fewer steps") from None
    if done.returncode:
        raise ValueError(f"{name} failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Bar:
    """Progress with an ETA: a bar on a terminal, a line now and then elsewhere, nothing on ranks other than 0.

    Call it with the bytes that are done.
    """

    def __init__(self, what: str, total: float) -> None:
        self.what, self.total, self.done = what, max(total, 1.0), 0.0
        self.started = self.said = time.monotonic()
        console = Console(stderr=True)
        self.bar: Progress | None = None
        if is_main() and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self.bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task(what, total=self.total)

    def __enter__(self) -> Bar:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            if kind is None:
                self.bar.update(self.task, completed=self.total)
            self.bar.stop()
        elif is_main() and kind is None:
            self._line(f"done in {time.monotonic() - self.started:.1f} s")

    def __call__(self, num_bytes: float) -> None:
        self.done = min(self.done + num_bytes, self.total)
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
        elif is_main() and now - self.said > _LINE_EVERY_S:
            self.said = now
            left = (now - self.started) * (self.total / self.done - 1)
            self._line(f"{100 * self.done / self.total:3.0f} % of {gigabytes(self.total)}, {left:.0f} s left")

    def _line(self, text: str) -> None:
        print(f"{self.what}: {text}", file=sys.stderr, flush=True)
