"""Tools and environments as users write them."""

import asyncio
import os
import sys
import threading
from typing import Literal

from megatron_opd.core.environment import Reply

LET_GO = threading.Event()


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C", tags: list[str] | None = None) -> dict:
    """The weather of a city.

    Args:
        city: The name of the city.
        days: How many days.
        unit: The unit of the temperature. (choices: ["C", "F"])
        tags: Whatever else.
    """
    return {"city": city, "days": days, "unit": unit, "tags": tags}


async def slowly(seconds: float) -> str:
    """Wait.

    Args:
        seconds: How long.
    """
    await asyncio.sleep(seconds)
    return "done"


async def leaves(status: int) -> str:
    """End the program.

    Args:
        status: Its status.
    """
    sys.exit(status)


def hang() -> str:
    """Wait for ever."""
    LET_GO.wait(600)
    return "never seen"


def fails(how: str) -> object:
    """Fail.

    Args:
        how: In which way.
    """
    if how == "exit":
        raise SystemExit(0)
    if how == "stop":
        raise StopIteration
    if how == "odd":
        return {1, 2} if os else None
    if how == "flood":
        return "x" * 10**7
    raise ValueError(how * 10**6)


def undescribed(x):
    return x


class Countdown:
    """Says how many turns are left."""

    fields = ("start",)
    note = "it counts"
    tools = ()

    def __init__(self, *, by: int = 1) -> None:
        self.by, self.left = by, 0

    @classmethod
    def check(cls, prompt):
        if "start" not in prompt.extra:
            raise ValueError('the row needs "start"')

    async def start(self, prompt):
        self.left = prompt.extra["start"]

    async def answer(self, turn):
        self.left -= self.by
        said = {"role": "user", "content": f"{self.left} left"}
        return Reply(messages=[said], is_done=self.left <= 0, reward=0.5, info={"left": self.left})

    async def close(self):
        self.left = -1


class WithTools(Countdown):
    @classmethod
    def tools(cls, *, by=1):
        return [{"type": "function", "function": {"name": f"by_{by}"}}]


class Bare:
    async def start(self, prompt): ...


class Blocking(Countdown):
    """Forgets that what answers must be async."""

    def answer(self, turn):
        return Reply(is_done=True)


class ToolNames(Countdown):
    """Gives names where schemas are asked for."""

    tools = ("calculator",)


class OddCheck(Countdown):
    @classmethod
    def check(cls, prompt):
        return prompt.extra["nowhere"]
