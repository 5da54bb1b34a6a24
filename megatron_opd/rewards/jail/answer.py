"""The process of the code under test: it loads the code, then calls what that defines as often as asked."""

from __future__ import annotations

import inspect
import os
from typing import Any, BinaryIO, NoReturn

import loops
import programs
from messages import from_plain, receive, send, to_plain

MAX_WORDS = 300


def serve(ask: BinaryIO, answer: BinaryIO) -> NoReturn:
    """Answer over the pipe until it ends."""
    try:
        task = receive(ask)
        readings = [[program] for program in task["programs"]]
        if task["answer"] is not None:
            readings += programs.readings(task["prompt"], task["answer"], task["entry_point"])
        namespace, why = _load(readings, task["entry_point"])
        if why is not None:
            send(answer, {"failed": why})
            os._exit(0)
        functions = {n: v for n, v in namespace.items() if isinstance(n, str) and callable(v)}
        waits = [name for name, value in functions.items() if inspect.iscoroutinefunction(value)]
        send(answer, {"defined": list(functions), "async": waits})
        while True:
            send(answer, _call(namespace, receive(ask)))
    except BaseException:
        os._exit(1)


def _load(readings: list[list[str]], entry_point: str | None) -> tuple[dict[str, Any], str | None]:
    """What the first reading that defines the entry point has defined, or why there is none."""
    why = "there is no program"
    for cells in readings:
        namespace: dict[str, Any] = {"__name__": "answer"}
        failed = None
        for cell in cells:  # one that fails, such as an example of use, takes nothing back from the others
            try:
                loops.prepare(cell)
                exec(compile(cell, "answer", "exec"), namespace)
            except BaseException as error:
                failed = failed or named(error)
        if entry_point is not None and callable(namespace.get(entry_point)):
            return namespace, None
        if entry_point is None and (failed is None or any(callable(value) for value in namespace.values())):
            return namespace, None
        why = failed or f"it defines no function {entry_point}"
    return {}, why


def _call(namespace: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    try:
        arguments, keywords = from_plain(asked["arguments"]), from_plain(asked["keywords"])
        value = namespace[asked["call"]](*arguments, **keywords)
        return {"value": to_plain(loops.run(value) if inspect.iscoroutine(value) else value)}
    except BaseException as error:
        return {"raised": type(error).__name__, "text": named(error)}


def named(error: BaseException) -> str:
    """Kind and text of an exception, whose own __str__ may be anything."""
    try:
        return f"{type(error).__name__}: {error}"[:MAX_WORDS]
    except BaseException:
        return "an exception that cannot be printed"
