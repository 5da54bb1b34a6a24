"""The environment `tools`: runs the calls of a turn, one after the other, and answers each with a message.

A turn without calls is the answer: nothing follows it. A call that cannot be run has one outcome, which is counted and
told to the policy in words (docs/environments.md has the table).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence

from megatron_opd.core.environment import Call, Message, Reply, Turn
from megatron_opd.core.types import Prompt
from megatron_opd.rollout.environments.refusals import answer_to, refused
from megatron_opd.rollout.environments.tool import Outcome, Tool, ToolKind

SHARE_OF_TURN = 0.8
"""A turn's calls have this share of its time limit, so that a tool that hangs is answered and the episode goes on."""
_LEAST_S = 0.05


class ToolsEnvironment:
    """Tools in one episode."""

    def __init__(self, kinds: Sequence[ToolKind], *, turn_timeout_s: float) -> None:
        """`turn_timeout_s`: the time limit of a turn, in seconds."""
        self._kinds = {kind.name: kind for kind in kinds}
        self._schemas = {kind.name: kind.schema for kind in kinds}
        self._tools: dict[str, Tool] = {}
        self._time_s = turn_timeout_s * SHARE_OF_TURN

    async def start(self, prompt: Prompt) -> None:
        """Tools are made when they are first called."""

    async def answer(self, turn: Turn) -> Reply:
        """A message for each call; none for a turn without calls."""
        deadline = time.monotonic() + self._time_s
        messages: list[Message] = []
        failures: Counter[str] = Counter()
        for call in turn.calls:
            outcome = await self._outcome(call, deadline)
            messages.append(answer_to(call, outcome.text))
            if outcome.failure:
                failures[outcome.failure] += 1
        return Reply(messages=messages, failures=dict(failures))

    async def close(self) -> None:
        """Close every tool that was called."""
        tools, self._tools = list(self._tools.values()), {}
        results = await asyncio.gather(*(tool.close() for tool in tools), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _outcome(self, call: Call, deadline: float) -> Outcome:
        refusal = refused(call, self._schemas)
        if refusal is not None:
            return refusal
        left_s = deadline - time.monotonic()
        if left_s < _LEAST_S:
            return Outcome(text="Error: the calls before this one have used up the turn's time", failure="timeout")
        if call.name not in self._tools:
            self._tools[call.name] = self._kinds[call.name].make()
        return await self._tools[call.name].call(call.arguments, left_s)
