"""The protocol of environments: one is started for a prompt, told each turn of the policy, and answers with messages.

kind = build_kind(settings)         once a source; its tools are in every prompt
world = kind.make()                 one object an episode
await world.start(prompt)
reply = await world.answer(turn)    until reply.is_done, or the policy needs nothing more
await world.close()                 always
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from megatron_opd.core.types import Prompt

Message: TypeAlias = Mapping[str, Any]
"""A message for the chat template: `role` and `content`, and for a tool's answer `name` and `tool_call_id`."""
Schema: TypeAlias = Mapping[str, Any]
"""A tool for the chat template: `{"type": "function", "function": {"name", "description", "parameters"}}`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A tool that the policy calls in a turn."""

    name: str
    """Empty where the call cannot be read."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    """Nine letters and digits, for templates that tie answers to calls."""
    problem: str = ""
    """Why the call cannot be read, in words for the policy; empty where it can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A turn of the policy, up to its end."""

    number: int
    """From 0."""
    text: str
    """All of it, thoughts and calls included, without the token that ends the turn."""
    content: str
    """The text without the calls."""
    calls: tuple[Call, ...] = ()
    token_ids: tuple[int, ...] = ()
    """The sampled tokens, the end of the turn included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The answer of an environment to a turn."""

    messages: Sequence[Message] = ()
    """Messages that the policy is told next. None at all: there is nothing to answer, and the episode ends."""
    is_done: bool = False
    """Whether the episode ends here; `messages` are not shown to the policy then."""
    reward: float = 0.0
    """Reward of this turn. The sum over an episode, cut to [0, 1], is what the reward `environment` gives."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Calls that failed, by reason: `not_json`, `unknown_tool`, `bad_arguments`, `error`, `timeout`, `died`."""
    info: Mapping[str, float] = field(default_factory=dict)
    """Numbers for the metrics `environment/NAME`, summed over an episode."""


class Environment(Protocol):
    """The world of one episode. A method that raises, or takes too long, ends the episode; the run goes on."""

    async def start(self, prompt: Prompt) -> None:
        """Get ready; the policy has said nothing yet."""

    async def answer(self, turn: Turn) -> Reply:
        """The answer to the policy's turn."""

    async def close(self) -> None:
        """Give back what it holds. Called once for each object, however the episode ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvironmentKind:
    """An environment that a config names."""

    name: str
    make: Callable[[], Environment]
    """A new object, for one episode."""
    tools: tuple[Schema, ...] = ()
    """Tools that every prompt shows."""
    check: Callable[[Prompt], None] = lambda prompt: None
    """Raises ValueError saying what the prompt's row lacks."""
    fields: tuple[str, ...] | None = ()
    """Fields of a row, besides prompt and answer, that Prompt.extra must keep; None: all of them."""
    note: str = ""
    """A line for people about how it works here."""
