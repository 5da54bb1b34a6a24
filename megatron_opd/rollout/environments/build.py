"""The environment that a config names: none, tools, or a class of the user's own as module:Class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_opd.config.environment import NONE, OF_THE_RUN, TOOLS, EnvironmentConfig
from megatron_opd.core.environment import EnvironmentKind, Reply, Schema, Turn
from megatron_opd.core.imported import imported
from megatron_opd.core.types import Prompt
from megatron_opd.rollout.environments import calculator, functions, python_session
from megatron_opd.rollout.environments.tool import ToolKind
from megatron_opd.rollout.environments.tools_environment import ToolsEnvironment

WHERE = "docs/environments.md"


def build_kind(settings: EnvironmentConfig) -> EnvironmentKind:
    """The environment of this section. Raises ValueError when there is none, or when it cannot work on this machine."""
    if settings.name == NONE:
        return EnvironmentKind(name=NONE, make=Silence)
    if settings.name == TOOLS:
        return _of_tools(settings)
    if settings.name == OF_THE_RUN or ":" not in settings.name:
        raise ValueError(f"there is no environment '{settings.name}'; known: none, tools, or a class as module:Class")
    return _of_class(settings)


class Silence:
    """No environment: an answer is one turn."""

    async def start(self, prompt: Prompt) -> None:
        """Nothing to do."""

    async def answer(self, turn: Turn) -> Reply:
        """No messages."""
        return Reply()

    async def close(self) -> None:
        """It holds nothing."""


def _of_tools(settings: EnvironmentConfig) -> EnvironmentKind:
    if not settings.tools:
        raise ValueError("environment.name is tools, but environment.tools names none: write tools: [calculator]")
    kinds = [_tool(name, settings) for name in settings.tools]
    names = [kind.name for kind in kinds]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"environment.tools has more than one tool of the name {twice[0]}")
    return EnvironmentKind(
        name=TOOLS,
        make=lambda: ToolsEnvironment(kinds, turn_timeout_s=settings.turn_timeout_s),
        tools=tuple(kind.schema for kind in kinds),
        note=python_session.note() if "python" in settings.tools else "",
    )


def _tool(name: str, settings: EnvironmentConfig) -> ToolKind:
    if name == "calculator":
        return calculator.KIND
    if name == "python":
        return python_session.kind(output_tokens=settings.output_tokens, cpu_s=settings.episode_timeout_s)
    if ":" in name:
        return functions.kind(name)
    raise ValueError(
        f"there is no tool '{name}'; known: calculator, python, or a function of yours as module:function ({WHERE})"
    )


def _of_class(settings: EnvironmentConfig) -> EnvironmentKind:
    name = f"environment '{settings.name}'"
    found = imported(settings.name, what="environment", kind="class")
    options = dict(settings.options)
    try:
        tools = getattr(found, "tools", ())
        tools = tuple(tools(**options) if callable(tools) else tools)
    except Exception as error:
        raise ValueError(f"{name}: its tools cannot be listed: {error!r}") from error
    missing = [method for method in ("start", "answer", "close") if not callable(getattr(found, method, None))]
    if missing:
        raise ValueError(f"{name} has no method {missing[0]} ({WHERE} says what an environment is)")
    try:
        inspect.signature(found).bind(**options)
    except TypeError as error:
        raise ValueError(f"{name}: environment.options do not fit: {error}") from None
    except ValueError:  # it has no signature that can be read
        pass
    if wrong := _not_async(found):
        raise ValueError(f"{name}: its method {wrong} must be async: write `async def {wrong}` ({WHERE})")
    _check_schemas(name, tools)
    fields = getattr(found, "fields", None)
    return EnvironmentKind(
        name=settings.name,
        make=lambda: found(**options),
        tools=tools,
        check=_checked_by(name, found),
        fields=None if fields is None else tuple(fields),
        note=str(getattr(found, "note", "")),
    )


def _not_async(found: Callable[..., Any]) -> str:
    """The first method that is a plain function, whose result could not be awaited; empty where there is none."""
    methods = {name: inspect.unwrap(getattr(found, name)) for name in ("start", "answer", "close")}
    plain = [name for name, method in methods.items() if inspect.isfunction(method)]
    return next((name for name in plain if not inspect.iscoroutinefunction(methods[name])), "")


def _check_schemas(name: str, tools: Sequence[Schema]) -> None:
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"{name}: its `tools` must be schemas, not {tool!r:.80}: write"
                f' {{"type": "function", "function": {{"name": …, "description": …, "parameters": …}}}} ({WHERE})'
            )


def _checked_by(name: str, found: Callable[..., Any]) -> Callable[[Prompt], None]:
    """The class's own check of rows, whose exceptions all say what is wrong with a row."""
    own = getattr(found, "check", None)

    def check(prompt: Prompt) -> None:
        try:
            if own is not None:
                own(prompt)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"{name}: its check raised {error!r}") from error

    return check
