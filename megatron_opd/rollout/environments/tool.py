"""A tool: described by a JSON schema, made once an episode, called with arguments, answers with a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_opd.core.environment import Schema


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The outcome of a call."""

    text: str
    """The policy reads it; where the call failed, why."""
    failure: str = ""
    """`error`, `timeout` or `died`; empty where the call did what it should."""


class Tool(Protocol):
    """A tool in one episode. Its calls follow each other."""

    async def call(self, arguments: Mapping[str, Any], timeout_s: float) -> Outcome:
        """The outcome for arguments that fit the schema, within about so many seconds.

        A call that fails has an outcome, too; an exception is a fault of the tool, and ends the episode.
        """

    async def close(self) -> None:
        """Give back what it holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolKind:
    """A tool that a config names."""

    schema: Schema
    make: Callable[[], Tool]
    """A new object, for one episode."""

    @property
    def name(self) -> str:
        """The name by which the policy calls it."""
        return str(self.schema["function"]["name"])
