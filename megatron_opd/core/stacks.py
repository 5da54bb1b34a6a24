"""The stacks of software that the project runs on, and every difference between them that the code has to know.

A stack is the versions that belong together: megatron-core, and the Transformer Engine that it was made for (setup.py has
their torch and Python). Megatron is not imported here: who does so looks names up by what its stack says.
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


OLDEST = Stack(
    name="oldest",
    megatron=("0.16.1", "0.17"),
    python="3.11",
    transformer_engine=("2.9", "2.12"),  # by megatron-core's own `dev` extra
    marks_shards=False,
    writes_files="write_preloaded_data_multiproc",
    reads_common="strategies.common.TorchCommonLoadStrategy.load_common",
    checks_kind="validation.verify_checkpoint_and_load_strategy",
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
    each = (f"{first} or later, below {last} (Python {stack.python})" for stack in STACKS for first, last in [stack.megatron])
    return ", or ".join(each)
