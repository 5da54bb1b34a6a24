"""Kinds of faults: each is a function that draws one from a random generator, plays it, and has it judged."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Played:
    """One injection: what was drawn, whether it was reached, and what was wrong afterwards."""

    facts: dict[str, Any]
    reached: bool = True
    """A fault that was not reached does not count."""
    wrong: list[str] = field(default_factory=list)


Play = Callable[[random.Random, Path], Played]
"""Plays one injection in a directory of its own."""
KINDS: dict[str, Play] = {}


def kind(play: Play) -> Play:
    """Register a kind under its function's name; the first line of its docstring says what happens."""
    KINDS[play.__name__] = play
    return play


def line(name: str) -> str:
    """A kind in one line."""
    return (KINDS[name].__doc__ or "").strip().splitlines()[0]
