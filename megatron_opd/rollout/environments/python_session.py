"""The tool python: a session an episode, in the sandbox of code rewards; names live on from call to call."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from megatron_opd.core.environment import Schema
from megatron_opd.rewards.sandbox import GUARDS, SandboxError, SandboxLimits
from megatron_opd.rewards.sandbox_session import SandboxSession, SessionEnded
from megatron_opd.rollout.environments.off_the_loop import in_thread
from megatron_opd.rollout.environments.tool import Outcome, ToolKind

CALL_S = 10.0
"""Longest time of a call, in seconds."""
MEMORY_MB = 512
_CHARACTERS_A_TOKEN = 8
_START_S = 60.0
_NOTHING = "(no output)"
_ADDRESS = re.compile(r"(?<= at )0x[0-9a-fA-F]+(?=[>,])")
"""Where an object lies in memory, as its repr says it: another place in each session."""
_ANEW = "The session begins anew: what was defined before is gone."

SCHEMA: Schema = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Runs Python code in a session that keeps its variables from call to call. Returns what the code"
        " prints, and the value of its last expression. There is the standard library, and no network.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The Python code to run."}},
            "required": ["code"],
        },
    },
}


def kind(*, output_tokens: int, cpu_s: float) -> ToolKind:
    """The tool; outputs are cut to about so many tokens, and a session ends with so many seconds of CPU time.

    Raises SandboxError where code cannot be confined.
    """
    guards_here()
    limits = SandboxLimits(timeout_s=cpu_s, memory_mb=MEMORY_MB)
    characters = _CHARACTERS_A_TOKEN * output_tokens
    return ToolKind(schema=SCHEMA, make=lambda: PythonSession(limits, characters=characters))


@functools.cache
def guards_here() -> tuple[str, ...]:
    """The guards that confine sessions on this machine. Raises SandboxError where code cannot be confined."""
    session = SandboxSession(SandboxLimits(timeout_s=_START_S), characters=80)
    try:
        session.run("", _START_S)
    except SessionEnded as error:
        raise SandboxError(f"code cannot be run here: the sandbox failed at an empty program: {error.reason}") from None
    finally:
        session.close()
    return session.guards


def note() -> str:
    """The guards that confine the code, in words."""
    guards = guards_here()
    missing = [guard for guard in GUARDS if guard not in guards]
    without = f"; not available here: {', '.join(missing)} (docs/rewards.md says what that leaves open)"
    return f"code runs confined by limits, {', '.join(guards)}{without if missing else ''}"


class PythonSession:
    """The session of an episode, begun at its first call and after each end."""

    def __init__(self, limits: SandboxLimits, *, characters: int) -> None:
        self._limits, self._characters = limits, characters
        self._session: SandboxSession | None = None

    async def call(self, arguments: Mapping[str, Any], timeout_s: float) -> Outcome:
        """The output of `code`, and the value of its last expression."""
        seconds = min(timeout_s, CALL_S)
        if self._session is None:
            self._session = SandboxSession(self._limits, characters=self._characters)
        try:
            run = functools.partial(self._session.run, with_start_s=timeout_s)
            said = await in_thread(run, arguments["code"], seconds)
        except SessionEnded as error:
            await self.close()
            return Outcome(text=f"Error: {_words(error, self._limits, seconds)} {_ANEW}", failure=error.reason)
        text = _ADDRESS.sub("0x...", said.text)  # so that an episode that is played again reads the same
        if said.has_failed:
            return Outcome(text=text, failure="error")
        return Outcome(text=text or _NOTHING)

    async def close(self) -> None:
        """End the session."""
        session, self._session = self._session, None
        if session is not None:
            await in_thread(session.close)


def _words(error: SessionEnded, limits: SandboxLimits, seconds: float) -> str:
    if error.reason == "timeout":
        return f"the code was ended after {seconds:.3g} seconds."
    return (
        "the code ended its session, or took more than it may:"
        f" {limits.memory_mb} MB of memory, {limits.total_mb} MB of files."
    )
