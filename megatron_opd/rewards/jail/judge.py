"""The process of the tests: they call the answer over a pipe, or made-up functions to see whether they can fail."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable
from typing import Any, BinaryIO

import collect
import programs
from answer import named
from messages import Closed, from_plain, receive, send, to_plain

_MADE_UP: tuple[Any, ...] = ("no answer returns this: 8d1f", 918_273_645_546, None, [("no", "answer")], {"8d1f": 0.125})
"""Results that no row expects, all five of them from one function."""


def judge(task: dict[str, Any], ask: BinaryIO, answers: BinaryIO) -> str | None:
    """None when the tests pass, else why they do not."""
    entry_point = task["entry_point"]
    try:
        send(ask, {name: task[name] for name in ("programs", "answer", "prompt", "entry_point")})
        loaded = receive(answers)
        if "defined" not in loaded:
            return str(loaded.get("failed"))
        # Without an entry point the tests may call whatever was defined, but nothing stands in for what they rely on.
        names = [entry_point] if entry_point else [str(n) for n in loaded["defined"] if not hasattr(builtins, str(n))]
        waits = loaded.get("async", [])
        functions = {name: _stand_in(name, ask, answers, waits=name in waits) for name in names}
        collect.run(task["tests"], functions, entry_point=entry_point, helpers=_helpers(task["prompt"]))
    except Closed:
        return "the code ended, or answered with more than a message may hold"
    except BaseException as error:  # the tests end with SystemExit, too, when they do not come to their end
        return named(error)
    return None


def probe(task: dict[str, Any]) -> str | None:
    """Why no answer can be told from another by these tests, or None when they can fail."""
    names = [task["entry_point"]] if task["entry_point"] else _unknown_names(task["tests"])
    passed = 0
    for value in _MADE_UP:
        functions = {name: _constant(value) for name in names}
        try:
            collect.run(task["tests"], functions, entry_point=task["entry_point"], helpers=_helpers(task["prompt"]))
        except (collect.CalledNothing, collect.Unusable) as error:
            return str(error)
        except BaseException:
            continue
        passed += 1
    return "they pass whatever the answer returns" if passed == len(_MADE_UP) else None


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *arguments, **keywords: value


def _unknown_names(tests: str) -> list[str]:
    """The names that tests use and do not define: the answer's."""
    nodes = list(ast.walk(ast.parse(tests)))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    made = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    made |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    imported = {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module in collect.MODULES_OF_THE_ANSWER
        for alias in node.names
    }
    read = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in collect.MODULES_OF_THE_ANSWER
    }
    modules = set(collect.MODULES_OF_THE_ANSWER)
    return sorted(((used - made - modules) | imported | read) - set(dir(builtins)))


def _helpers(prompt: str) -> dict[str, Any]:
    """What a prompt that is Python defines: tests may use helper functions that it has."""
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(programs.preamble(programs.python_of(prompt)), "prompt", "exec"), namespace)
    except Exception:
        return {}
    return namespace


def _stand_in(name: str, ask: BinaryIO, answers: BinaryIO, *, waits: bool) -> Callable[..., Any]:
    """A function for the tests that calls the one of this name in the other process."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        send(ask, {"call": name, "arguments": to_plain(list(arguments)), "keywords": to_plain(keywords)})
        reply = receive(answers)
        if "raised" in reply:
            kind = getattr(builtins, str(reply["raised"]), None)
            is_error = isinstance(kind, type) and issubclass(kind, Exception)
            raise (kind if is_error else RuntimeError)(str(reply.get("text")))
        return from_plain(reply["value"])

    async def wait(*arguments: Any, **keywords: Any) -> Any:
        return call(*arguments, **keywords)

    return wait if waits else call
