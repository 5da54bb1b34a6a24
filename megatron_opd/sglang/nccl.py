"""One NCCL for the trainer and its servers: `rollout.sync: broadcast` puts both into one group.

NCCL refuses a group whose members have different versions, and a wheel of torch brings exactly one version. So both
sides are compared before anything starts: the environment of servers that we start is asked. A running server says
nothing of its NCCL; there the failure of the group is put into the same words.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import torch

ASK_S = 180.0
"""Longest time that the servers' Python has for importing torch, in seconds; a cold network disk takes minutes."""
SWITCHES = ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")
"""Features that SGLang 0.5.23 switches off in its processes unless the environment says otherwise."""
_ASK = """\
import torch
try:
    nccl = ".".join(map(str, torch.cuda.nccl.version()[:3]))
except Exception:
    nccl = "none"
print("answer", torch.__version__, nccl)
"""
_MISMATCH = re.compile(r"Mismatched NCCL version.*?version (\d+).*?version (\d+)", re.DOTALL)
_NEED = "rollout.sync: broadcast needs the same NCCL on both sides"
_FIX = (
    "install the torch of the servers in the trainer's environment too (SGLang 0.5.23: torch 2.14.1), or the same"
    " nvidia-nccl-cu13 on both sides (pip install --no-deps nvidia-nccl-cu13==VERSION), or set rollout.sync: disk, or"
    " tensor on one machine"
)


@dataclass(frozen=True, slots=True)
class Nccl:
    """The NCCL of an environment."""

    torch: str
    """Version of torch."""
    version: str
    """2.30.7; empty where torch has none."""

    def __str__(self) -> str:
        return f"{f'NCCL {self.version}' if self.version else 'no NCCL'} (torch {self.torch})"


def own() -> Nccl:
    """This process's: the library that it has loaded."""
    try:
        version = ".".join(str(part) for part in torch.cuda.nccl.version()[:3])
    except (AttributeError, RuntimeError):  # torch for CPUs
        version = ""
    return Nccl(torch.__version__, version)


def of(python: str | Path, timeout_s: float = ASK_S) -> Nccl:
    """The NCCL in the environment of a Python interpreter. Raises ValueError when that does not say it in time."""
    try:
        done = subprocess.run(
            [str(python), "-c", _ASK], capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{python} has not imported torch in {timeout_s:g} s") from None
    except OSError as error:
        raise ValueError(f"{python}: {error.strerror}") from None
    for line in done.stdout.splitlines():
        word, *rest = line.split()
        if word == "answer" and len(rest) == 2:
            return Nccl(rest[0], "" if rest[1] == "none" else rest[1])
    last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
    raise ValueError(f"{python} does not say which NCCL its torch has: {last}")


def compare(mine: Nccl, python: str | Path, *, setting: str, say: Callable[[str], None]) -> None:
    """Whether the servers that `python` runs, by `setting`, can be in a group with a process that has `mine`.

    Raises ValueError for servers with another NCCL; where theirs is not known, `say` gets a line.
    """
    try:
        theirs = of(python)
    except ValueError as error:
        say(f"warning: {_NEED}; ours is {mine}, the servers' is unknown: {error}")
        return
    if mine.version != theirs.version or not mine.version:
        raise ValueError(
            f"{_NEED}, but the trainer has {mine} and the servers of {setting} ({python}) have {theirs}: {_FIX}"
        )


def explain(texts: Iterable[str]) -> str:
    """Why no group can be made, where errors of its members say that their NCCL differs; empty where none does."""
    for text in texts:
        if found := _MISMATCH.search(text):
            one, other = map(_readable, sorted((int(found[1]), int(found[2]))))
            return f"{_NEED}; this process has {own()}, and the group has {one} and {other}: {_FIX}"
    return ""


def settle(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set NCCL's switches as SGLang does in its processes, unless they are set. Before NCCL's first use: it reads them
    once. All ranks need the same, because they are in groups with each other."""
    for name in SWITCHES:
        environment.setdefault(name, "0")


def _readable(code: int) -> str:
    """22907 -> 2.29.7."""
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"
