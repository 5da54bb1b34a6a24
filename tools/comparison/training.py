"""A run of the trainer in a process of its own, and the time that such processes take."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_SAID = 15
"""Lines of its log that are shown of a run that fails."""


def train(config: Path, folder: Path, overrides: Sequence[str], *, threads: int, timeout_s: int) -> None:
    """Train in `folder`, or go on there, as the only rank of its world: there is no launcher between us and it. What it
    says is appended to log.txt.

    Raises ValueError where the run fails, or takes longer than `timeout_s`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    log = folder / "log.txt"
    where = [str(config.resolve()), f"run.dir={folder.resolve()}"]
    command = [sys.executable, "-m", "megatron_opd", "train", *where, *overrides]
    with log.open("a") as out:
        how: dict[str, Any] = {"stdout": out, "stderr": out, "timeout": timeout_s, "check": False}
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment(threads, **alone), **how)
        except subprocess.TimeoutExpired:
            raise ValueError(f"a run took more than {timeout_s} s (--timeout); see {log}") from None
    if done.returncode:
        raise ValueError(f"a run failed; see {log}:\n" + "\n".join(log.read_text().splitlines()[-_SAID:]))


def check_models(*models: Path, told_by: str) -> None:
    """Raises ValueError where a model is not there; the help of the tool `told_by` says how to get it."""
    for model in models:
        if not (model / "config.json").is_file():
            raise ValueError(f"{model} holds no model; python {told_by} --help says how to get it")


def environment(threads: int, **more: str) -> dict[str, str]:
    """Variables of a process that computes with this checkout and asks no hub."""
    own = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **own, "HF_HUB_OFFLINE": "1", **more}


def core_seconds() -> float:
    """CPU seconds of all processes that we waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
