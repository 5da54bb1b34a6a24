"""Tools of the user's own: Python functions by their import paths, described by their signatures and docstrings."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from megatron_opd.core.environment import Schema
from megatron_opd.core.imported import imported
from megatron_opd.rollout.environments.off_the_loop import in_thread
from megatron_opd.rollout.environments.tool import Outcome, ToolKind

MAX_CHARACTERS = 100_000
"""Characters of the longest answer; the rest is dropped before anybody counts its tokens."""
_MAX_WORDS = 1000


def kind(path: str) -> ToolKind:
    """The tool of `module:function`. Raises ValueError when it is not there, or cannot be described."""
    function = imported(path, what="tool", kind="function")
    if inspect.isclass(function):
        raise ValueError(f"tool '{path}' is a class; name a function")
    return ToolKind(schema=schema_of(function, path), make=lambda: Function(function))


def schema_of(function: Callable[..., Any], path: str) -> Schema:
    """The schema that transformers makes of type hints and of a docstring with a line for each argument."""
    from transformers.utils import get_json_schema

    try:
        schema = get_json_schema(function)
    except Exception as error:  # it has a kind of its own for each thing that may be missing
        raise ValueError(
            f"tool '{path}' cannot be described: {str(error).rstrip(' .!')}. Write a type hint for each argument, and a"
            ' docstring that says what the function does and has "Args:" with a line "name: what it is" for each.'
        ) from error
    return {"type": "function", "function": {k: v for k, v in schema["function"].items() if k != "return"}}


class Function:
    """A function in one episode. It runs as you, in the trainer: the policy chooses its arguments, and nothing else."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    async def call(self, arguments: Mapping[str, Any], timeout_s: float) -> Outcome:
        """The function's result as text. One that is not async runs in a thread, which goes on after the limit."""
        try:
            if inspect.iscoroutinefunction(self._function):
                value = await asyncio.wait_for(_awaited(self._function, arguments), timeout_s)
            else:
                value = await asyncio.wait_for(in_thread(_text_of_call, self._function, arguments), timeout_s)
            return Outcome(text=_text(value))
        except TimeoutError:
            return Outcome(text=f"Error: the tool was given up after {timeout_s:.3g} seconds", failure="timeout")
        except Exception as error:
            return Outcome(text=f"Error: {type(error).__name__}: {error}"[:_MAX_WORDS], failure="error")

    async def close(self) -> None:
        """It holds nothing."""


async def _awaited(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """The function's result; a SystemExit is an exception like any other, as in a thread."""
    try:
        return await function(**arguments)
    except SystemExit as error:
        raise RuntimeError(repr(error)) from error


def _text_of_call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    return _text(function(**arguments))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value[:MAX_CHARACTERS]
    try:
        return json.dumps(value, ensure_ascii=False)[:MAX_CHARACTERS]
    except (TypeError, ValueError, RecursionError):
        return str(value)[:MAX_CHARACTERS]
