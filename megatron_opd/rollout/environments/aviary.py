"""Environments of aviary (the package fhaviary), which work step by step in this process, without an endpoint.

    environment:
      name: megatron_opd.rollout.environments.aviary:Aviary
      options: {dataset: gsm8k, split: train}      # a row's `task` is a number: the environment of that index
      options: {environment: calculator}           # a row's `task` is a text: the environment's from_task makes it

Datasets and environments go by the names that aviary knows, or as module:Class; the other options are arguments of the
dataset. A prompt has to be what the environment's reset says: `tools/aviary_prompts.py` writes such rows.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_opd.core.environment import Call, Message, Reply, Schema, Turn
from megatron_opd.core.imported import imported
from megatron_opd.core.types import Prompt
from megatron_opd.rollout.environments.off_the_loop import run_once
from megatron_opd.rollout.environments.refusals import answer_to, refused

_MAX_WORDS = 1000


class Aviary:
    """An environment of aviary in one episode. It runs as you, in the trainer."""

    fields = ("task",)

    def __init__(self, *, dataset: str = "", environment: str = "", **options: Any) -> None:
        self._source = _source(dataset, environment, options)
        self._schemas = {schema["function"]["name"]: schema for schema in _shown(dataset, environment, **options)}
        self._world: Any = None

    @classmethod
    def tools(cls, *, dataset: str = "", environment: str = "", **options: Any) -> tuple[Schema, ...]:
        """The tools of the first task; those of all others must be the same. Raises ValueError, or what aviary does."""
        return _shown(dataset, environment, **options)

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Raises ValueError where the row has no task."""
        task = prompt.extra.get("task")
        if isinstance(task, bool) or not isinstance(task, int | str):
            raise ValueError('the environment needs a field "task": a number of the dataset, or a text for from_task')

    async def start(self, prompt: Prompt) -> None:
        """Reset the environment of the row's task. What it says is in the prompt already.

        Raises ValueError where it has other tools than the prompts show.
        """
        self._world = self._source(prompt.extra["task"])
        _, tools = await self._world.reset()
        if _schemas(tools) != list(self._schemas.values()):
            raise ValueError(f"task {prompt.extra['task']!r} has other tools than the first task")

    async def answer(self, turn: Turn) -> Reply:
        """One step with the calls that can be run. A turn with none of those but with others is no step."""
        refusals = {at: found for at, call in enumerate(turn.calls) if (found := refused(call, self._schemas))}
        failures = Counter(found.failure for found in refusals.values())
        told = [answer_to(turn.calls[at], found.text) for at, found in refusals.items()]
        good = [call for at, call in enumerate(turn.calls) if at not in refusals]
        if turn.calls and not good:
            return Reply(messages=told, failures=dict(failures))
        try:
            said, reward, is_done, is_truncated = await self._world.step(_action(turn, good))
        except Exception as error:
            if not good:
                raise
            failures["error"] += len(good)
            text = f"Error: {type(error).__name__}: {error}"[:_MAX_WORDS]
            told += [answer_to(call, text) for call in good]
            return Reply(messages=_in_order(turn, told), failures=dict(failures))
        return Reply(
            messages=_in_order(turn, [*told, *map(_message, said)]),
            is_done=bool(is_done or is_truncated),
            reward=float(reward),
            failures=dict(failures),
            info={"truncated": 1.0} if is_truncated else {},
        )

    async def close(self) -> None:
        """Close the environment."""
        world, self._world = self._world, None
        if world is not None:
            await world.close()


def rows(tasks: Sequence[int | str], *, dataset: str = "", environment: str = "", **options: Any) -> Iterator[dict]:
    """A row for a file of prompts for each task: the messages that its environment begins with, and the task."""
    source = _source(dataset, environment, options)
    for task in tasks:
        said, _ = run_once(functools.partial(_beginning, source, task))
        yield {"prompt": [_message(one) for one in said], "task": task}


def _source(dataset: str, environment: str, options: Mapping[str, Any]) -> Any:
    """A function from a task to a new environment."""
    if bool(dataset) == bool(environment):
        raise ValueError("environment.options of aviary must name either a dataset or an environment")
    if environment and options:
        raise ValueError(f"environment.options: an environment of aviary takes no option {next(iter(options))!r}")
    return _dataset(dataset, **options).get_new_env_by_idx if dataset else _environment(environment).from_task


@functools.cache
def _dataset(name: str, **options: Any) -> Any:
    return _found(name, "TASK_DATASET_REGISTRY")(**options)


def _environment(name: str) -> Any:
    return _found(name, "ENV_REGISTRY")


def _found(name: str, registry: str) -> Any:
    try:
        import aviary.env as known
    except ModuleNotFoundError as error:
        raise ValueError(
            f"environments of aviary need the package fhaviary ({error}): pip install 'megatron-opd[aviary]'"
        ) from None
    names = getattr(known, registry)
    path = name if ":" in name else ":".join(names.get(name, ()))
    if not path:
        raise ValueError(f"aviary knows no {name!r}, but {', '.join(sorted(names))}; or write module:Class")
    return imported(path, what="aviary", kind="class")


@functools.cache
def _shown(dataset: str, environment: str, **options: Any) -> tuple[Schema, ...]:
    source = _source(dataset, environment, options)
    _, tools = run_once(functools.partial(_beginning, source, 0 if dataset else ""))
    return tuple(_schemas(tools))


async def _beginning(source: Any, task: int | str) -> tuple[Sequence[Any], Sequence[Any]]:
    """The first words of the task's environment, and its tools."""
    world = source(task)
    try:
        said, tools = await world.reset()
        return list(said), list(tools)
    finally:
        await world.close()


def _schemas(tools: Sequence[Any]) -> list[Schema]:
    listed = [tool.info.model_dump(exclude_none=True) for tool in tools]
    nothing = {"type": "object", "properties": {}}
    return [{"type": "function", "function": {"parameters": nothing, **one}} for one in listed]


def _action(turn: Turn, calls: Sequence[Call]) -> Any:
    """The turn as aviary's message of the policy."""
    from aviary.core import Message as Said
    from aviary.core import ToolCall, ToolCallFunction, ToolRequestMessage

    if not calls:
        return Said(role="assistant", content=turn.content)
    functions = [ToolCallFunction(name=call.name, arguments=dict(call.arguments)) for call in calls]
    asked = [ToolCall(id=call.id, function=function) for call, function in zip(calls, functions, strict=True)]
    return ToolRequestMessage(content=turn.content, tool_calls=asked)


def _message(said: Any) -> Message:
    tied = {name: getattr(said, name) for name in ("name", "tool_call_id") if hasattr(said, name)}
    return {"role": said.role, "content": said.content or "", **tied}


def _in_order(turn: Turn, messages: Sequence[Message]) -> list[Message]:
    """Answers to calls in the calls' order, then everything else."""
    order = {call.id: at for at, call in enumerate(turn.calls)}
    return sorted(messages, key=lambda message: order.get(message.get("tool_call_id", ""), len(order)))
