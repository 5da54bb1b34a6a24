"""Environments at work, within time limits and on a thread of their own, so that none of them holds up the others.

What an environment does wrong is raised here and nowhere else: `Trouble` ends an episode, and never the run.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Literal, TypeVar

from megatron_opd.core.event_loop import Loop

_T = TypeVar("_T")
_ALIVE_S = 5.0
_MAX_WORDS = 300


class Trouble(Exception):
    """An environment failed, or took too long."""

    def __init__(self, kind: Literal["failed", "timeout"], why: str) -> None:
        super().__init__(why)
        self.kind, self.why = kind, why


class EnvironmentThread:
    """Runs the methods of environments. One that blocks the thread instead of waiting is left behind with it."""

    def __init__(self) -> None:
        self._loop = Loop("environments")
        self._left: list[Loop] = []
        self._replacing = threading.Lock()

    async def run(self, work: Coroutine[Any, Any, _T], limit_s: float) -> _T:
        """The result of a method. Raises Trouble when it raises, or is not done in time."""
        loop = self._loop
        try:
            return await asyncio.wait_for(asyncio.wrap_future(loop.start(_tame(work))), limit_s)
        except TimeoutError:
            await self._replace_if_stuck(loop)
            raise Trouble("timeout", f"it took longer than {limit_s:g} s") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise Trouble("failed", "it cancelled itself") from None
        except Exception as error:
            raise Trouble("failed", _named(error)) from error

    def close(self) -> None:
        """End what is still running."""
        self._loop.close()
        for loop in self._left:
            loop.abandon()

    async def _replace_if_stuck(self, loop: Loop) -> None:
        alive = asyncio.wrap_future(loop.start(_nothing()))
        try:
            await asyncio.wait_for(alive, _ALIVE_S)
        except TimeoutError:
            with self._replacing:
                if self._loop is loop:
                    self._left.append(loop)
                    self._loop = Loop("environments")


async def _nothing() -> None:
    """Shows that a thread is alive."""


async def _tame(work: Coroutine[Any, Any, _T]) -> _T:
    """The work, whose exceptions end nothing but itself."""
    try:
        return await work
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # SystemExit would end the thread with it
        raise RuntimeError(_named(error)) from error


def _named(error: BaseException) -> str:
    """Kind and text of an exception, whose own __str__ may be anything."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return str(error)
    try:
        said = f"{type(error).__name__}: {error}"[:_MAX_WORDS]
    except BaseException:
        said = type(error).__name__
    return f"{said}{_place(error)}"


def _place(error: BaseException) -> str:
    """Where it was raised: file and line, but for this file."""
    last = next(iter(traceback.extract_tb(error.__traceback__)[:-2:-1]), None)
    return "" if last is None or last.filename == __file__ else f" ({Path(last.filename).name}, line {last.lineno})"
