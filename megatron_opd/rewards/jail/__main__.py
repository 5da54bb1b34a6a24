"""Two processes that the kernel confines: one runs the code under test, the other the tests, which call it over a pipe.

Because only plain values cross, the code under test can neither say that the tests passed, nor end them early, nor
change what they compare with, nor read them. Started by `sandbox.py` as `python -I -S <this directory> SETTINGS` with
the task on standard input; the verdict, a JSON object, is all that goes to standard output.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

import guards
from messages import Closed, from_plain, receive, send, to_plain

_MAX_WORDS = 300


def main() -> None:
    """Confine this process, split it in two, and write the verdict."""
    settings = json.loads(sys.argv[1])
    sys.set_int_max_str_digits(0)
    verdict = os.fdopen(os.dup(1), "wb")
    in_force = _confine(settings)
    (to_read, to_answer), (to_hear, to_ask) = os.pipe(), os.pipe()
    if os.fork() == 0:
        _serve(to_hear, to_answer, use_seccomp=guards.SECCOMP in settings["guards"])
    os.close(to_answer), os.close(to_hear)
    with open(0, encoding="utf-8") as stdin:
        task = json.load(stdin)
    _silence()
    if guards.SECCOMP in settings["guards"] and guards.deny_calls():
        in_force.append(guards.SECCOMP)
    if not any(guard in in_force for guard in guards.CUT_THE_NETWORK):
        said = {"refused": "the kernel offers neither user namespaces nor seccomp, so the network cannot be cut off"}
    else:
        why = _judge(task, os.fdopen(to_ask, "wb"), os.fdopen(to_read, "rb"))
        said = {"passed": why is None, "why": (why or "")[:_MAX_WORDS], "guards": in_force}
    verdict.write(json.dumps(said).encode())
    verdict.flush()
    os._exit(0)  # whatever the tests have left behind


def _confine(settings: dict[str, Any]) -> list[str]:
    """Everything that both processes have in common; returns the names of the guards in force."""
    guards.die_with_parent()
    guards.hide_memory()
    in_force = []
    if guards.NAMESPACES in settings["guards"] and guards.enter_namespaces():
        in_force.append(guards.NAMESPACES)
    # Outside of a namespace the kernel counts all that the user runs, the trainer's threads too: a limit on that would
    # end this process where it splits. Nothing is run there without seccomp, which allows no processes at all.
    counts_alone = {} if guards.NAMESPACES in in_force else {"processes": None}
    guards.limit(**settings["limits"] | counts_alone)
    if guards.LANDLOCK in settings["guards"] and guards.only_files(
        readable=settings["readable"], writable=[os.getcwd(), os.devnull]
    ):
        in_force.append(guards.LANDLOCK)
    guards.drop_privileges()
    return in_force


def _silence() -> None:
    """What is printed goes nowhere; there is nothing to read."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)


# The process of the code under test.


def _serve(to_hear: int, to_answer: int, *, use_seccomp: bool) -> NoReturn:
    """Load the code, then call what it defined as often as asked."""
    guards.die_with_parent()
    _silence()
    os.dup2(to_hear, 3), os.dup2(to_answer, 4)
    os.closerange(5, 64)
    if use_seccomp:
        guards.deny_calls()
    ask, answer = os.fdopen(3, "rb"), os.fdopen(4, "wb")
    try:
        task = receive(ask)
        namespace, why = _load(task["programs"], task["entry_point"])
        if why is not None:
            send(answer, {"failed": why})
            os._exit(0)
        send(answer, {"defined": [n for n, v in namespace.items() if isinstance(n, str) and callable(v)]})
        while True:
            send(answer, _call(namespace, receive(ask)))
    except BaseException:
        os._exit(1)


def _load(programs: list[str], entry_point: str | None) -> tuple[dict[str, Any], str | None]:
    """What the first program that runs and defines the entry point has defined, or why there is none."""
    why = "there is no program"
    for program in programs:
        namespace: dict[str, Any] = {"__name__": "answer"}
        try:
            exec(compile(program, "answer", "exec"), namespace)
        except BaseException as error:
            why = _named(error)
            continue
        if entry_point is None or callable(namespace.get(entry_point)):
            return namespace, None
        why = f"it defines no function {entry_point}"
    return {}, why


def _call(namespace: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    try:
        arguments, keywords = from_plain(asked["arguments"]), from_plain(asked["keywords"])
        return {"value": to_plain(namespace[asked["call"]](*arguments, **keywords))}
    except BaseException as error:
        return {"raised": type(error).__name__, "text": _named(error)}


def _named(error: BaseException) -> str:
    """Kind and text of an exception, whose own __str__ may be anything."""
    try:
        return f"{type(error).__name__}: {error}"[:_MAX_WORDS]
    except BaseException:
        return "an exception that cannot be printed"


# The process of the tests.


def _judge(task: dict[str, Any], ask: BinaryIO, answers: BinaryIO) -> str | None:
    """None when the tests pass, else why they do not."""
    entry_point = task["entry_point"]
    try:
        send(ask, {"programs": task["programs"], "entry_point": entry_point})
        loaded = receive(answers)
        if "defined" not in loaded:
            return str(loaded.get("failed"))
        namespace = _helpers(task["prompt"])
        # Without an entry point the tests may call whatever was defined, but nothing stands in for what they rely on.
        names = [entry_point] if entry_point else [str(n) for n in loaded["defined"] if not hasattr(builtins, str(n))]
        namespace.update({name: _stand_in(name, ask, answers) for name in names})
        exec(compile(task["tests"], "tests", "exec"), namespace)
        if entry_point and callable(namespace.get("check")):
            namespace["check"](_stand_in(entry_point, ask, answers))
    except Closed:
        return "the code ended, or answered with more than a message may hold"
    except BaseException as error:  # the tests end with SystemExit, too, when they do not come to their end
        return _named(error)
    return None


def _helpers(prompt: str) -> dict[str, Any]:
    """What a prompt that is Python defines: tests may use helper functions that it has."""
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(ast.parse(prompt), "prompt", "exec"), namespace)
    except Exception:
        return {"__name__": "tests"}
    return namespace


def _stand_in(name: str, ask: BinaryIO, answers: BinaryIO) -> Callable[..., Any]:
    """A function for the tests that calls the one of this name in the other process."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        send(ask, {"call": name, "arguments": to_plain(list(arguments)), "keywords": to_plain(keywords)})
        reply = receive(answers)
        if "raised" in reply:
            kind = getattr(builtins, str(reply["raised"]), None)
            is_error = isinstance(kind, type) and issubclass(kind, Exception)
            raise (kind if is_error else RuntimeError)(str(reply.get("text")))
        return from_plain(reply["value"])

    return call


main()
