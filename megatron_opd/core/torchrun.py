"""The place of this process among those that torchrun or its like has started; without them it is alone."""

from __future__ import annotations

import os


def is_main() -> bool:
    """Whether this is the process that talks."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """The processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))
