"""An environment that does everything wrong that one can do, by a seed; and one that the process does not survive."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

from megatron_opd.core.environment import Reply, Turn
from megatron_opd.core.types import Prompt

_SAYS = ("+1=", "77", "=", "9-9")
_COUNT: list[int] = []
"""An entry for each answer of this process."""


class World:
    """Answers with some characters, or misbehaves in `share` of all turns. Of equal prompts and turns it does the same.

    `kill_at`: the process is killed at its so-many-th answer, once: the file `mark` is there then.
    """

    def __init__(self, *, seed: int = 0, share: float = 0.0, kill_at: int = 0, mark: str = "") -> None:
        self._seed, self._share, self._kill_at, self._mark = seed, share, kill_at, mark
        self._random = random.Random()

    async def start(self, prompt: Prompt) -> None:
        """Some objects fail here already."""
        self._random = random.Random(f"{self._seed}/{prompt.source}/{prompt.index}")
        if self._random.random() < self._share / 4:
            raise OSError("there is no world today")

    async def answer(self, turn: Turn) -> Reply:
        """An answer that an environment may give, or one that it may not."""
        _COUNT.append(turn.number)
        if len(_COUNT) == self._kill_at and not Path(self._mark).exists():
            Path(self._mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self._random.random() < self._share:
            return await self._misbehave(self._random.randrange(10))
        if turn.number == 2 or self._random.random() < 0.2:
            return Reply(is_done=turn.number == 2, reward=self._random.random())
        return Reply(messages=[{"role": "user", "content": self._random.choice(_SAYS)}], info={"said": 1.0})

    async def close(self) -> None:
        """Some cannot be closed."""
        if self._random.random() < self._share / 4:
            raise OSError("the world does not end")

    async def _misbehave(self, how: int) -> Any:
        if how == 0:
            raise KeyError("lost")
        if how == 1:
            raise SystemExit(3)
        if how == 2:
            raise asyncio.CancelledError
        if how == 3:
            raise RecursionError("too deep")
        if how == 4:
            await asyncio.sleep(3600)
        if how == 5:
            return Reply(messages=[{"role": "user", "content": "1" * 200_000}])
        if how == 6:
            return Reply(reward=float("nan"))
        if how == 7:
            return "a text"
        return Reply(messages=[{"role": "nobody"}] if how == 8 else 5)  # type: ignore[arg-type]
