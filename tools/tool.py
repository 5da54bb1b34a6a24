"""What the tools in this folder share: errors as one line, options, and figures of other programs.

A tool is a function from parsed arguments to an exit code; `run` calls it. Errors of users are `ValueError` or
`OSError` and end with exit code 1 and one line on stderr; under torchrun rank 0 says them for all.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_opd.commands import offline
from megatron_opd.commands.offline import positive
from megatron_opd.core.torchrun import is_main
from megatron_opd.tracking.bytes_bar import gigabytes

__all__ = ["DTYPES", "add_model_and_prompts", "gigabytes", "is_main", "positive", "run", "told_by"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_model_and_prompts(parser: argparse.ArgumentParser) -> None:
    """The arguments `model` and `--prompts` of a tool that samples a real model."""
    prompts = Path(__file__).resolve().parents[1] / "examples/llm/data/gsm8k.eval.jsonl"
    parser.add_argument("model", type=Path, help="a Hugging Face directory with a chat template")
    parser.add_argument(
        "--prompts", type=Path, default=prompts, metavar="FILE", help="JSON lines (GSM8K's held-out rows)"
    )


def run(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """The tool's exit code, with errors said in one line."""
    try:
        with offline.work():
            return command(arguments)
    except BrokenPipeError:  # the reader of our output has seen enough, like `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


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
