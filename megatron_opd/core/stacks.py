"""The stacks of software that the project runs on, and every difference between them that the code has to know.

A stack is the versions that belong together: megatron-core, and the Transformer Engine that it was made for (setup.py
has their torch). Megatron is not imported here: who imports it looks names up by what the stack says.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from packaging.version import Version


@dataclass(frozen=True, slots=True)
class Stack:
    """One of them. A range of versions is from its first (inclusive) to its second (exclusive)."""

    name: str
    megatron: tuple[str, str]
    python: str
    """The first Python that has this megatron-core."""
    transformer_engine: tuple[str, str]
    marks_shards: bool
    """Whether Megatron's layers mark their parameters as shards where they do not initialise them, too. They refuse to
    be marked twice."""
    writes_files: str
    """The static method of Megatron's FileSystemWriterAsync that writes a rank's files of a checkpoint."""
    reads_common: str
    """The function that reads what all ranks of a checkpoint share, by its path in megatron.core.dist_checkpointing."""
    checks_kind: str
    """The function that refuses a directory of another kind, by the same path."""
    loads_apart: bool
    """Whether a rank that cannot load its part of a checkpoint is the only one that knows."""
    idle_talk: tuple[tuple[str, str], ...]
    """Loggers, and how a line of each begins that no user can do anything about: Megatron's own plans; a torch for CUDA
    that finds no device."""


OLDEST = Stack(
    name="oldest",
    megatron=("0.16.1", "0.17"),
    python="3.11",
    transformer_engine=("2.9", "2.12"),  # by megatron-core's own `dev` extra
    marks_shards=False,
    writes_files="write_preloaded_data_multiproc",
    reads_common="strategies.common.TorchCommonLoadStrategy.load_common",
    checks_kind="validation.verify_checkpoint_and_load_strategy",
    loads_apart=False,
    idle_talk=(),
)
NEWEST = Stack(
    name="newest",
    megatron=("0.19.2", "0.20"),
    python="3.12",
    transformer_engine=("2.20", "2.21"),  # the newest of its day; megatron-core itself names none
    marks_shards=True,
    writes_files="write_preloaded_data_multithread",
    reads_common="serialization.load_common_state_dict",
    checks_kind="validation.verify_checkpoint",
    loads_apart=True,
    idle_talk=(
        ("torch.utils.cpp_extension", "No CUDA runtime is found"),
        ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
        (
            "megatron.core.distributed.distributed_data_parallel",
            "DistributedDataParallel: full_param_layout not provided",
        ),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
    ),
)
STACKS = (OLDEST, NEWEST)


def here() -> Stack:
    """The stack of the megatron-core that is installed. Raises ValueError for a version of none."""
    try:
        return of(importlib.metadata.version("megatron-core"))
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"the package megatron-core is not installed; install {_choice()}") from None


def of(megatron: str) -> Stack:
    """The stack of a version of megatron-core. Raises ValueError for one of none."""
    for stack in STACKS:
        first, last = stack.megatron
        if Version(first) <= Version(megatron) < Version(last):
            return stack
    raise ValueError(f"megatron-core {megatron} is none of those that this version runs on; install {_choice()}")


def _choice() -> str:
    return ", or ".join(f"{s.megatron[0]} or later, below {s.megatron[1]} (Python {s.python})" for s in STACKS)
