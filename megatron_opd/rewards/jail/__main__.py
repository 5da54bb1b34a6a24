"""Two processes that the kernel confines: one runs the code under test, the other the tests, which call it over a pipe.

Because only plain values cross, the code under test can neither say that the tests passed, nor end them early, nor
change what they compare with, nor read them. Started by `sandbox.py` as `python -s -P -S <this directory> SETTINGS`
with the task on standard input; the verdict, a JSON object, is all that goes to standard output.

With `notebook` in the settings it is one process, confined alike, which runs cells from standard input until that ends
and writes a message for each.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, BinaryIO, NoReturn

import guards
import notebook
from answer import MAX_WORDS, serve
from judge import judge, probe
from messages import send

NO_GUARD = "the kernel offers neither user namespaces nor seccomp, so the network cannot be cut off"


def main() -> None:
    """Confine this process, split it in two, and write the verdict."""
    settings = json.loads(sys.argv[1])
    sys.set_int_max_str_digits(0)
    del os.environ["PYTHONHASHSEED"]  # it has done its work
    verdict = os.fdopen(os.dup(1), "wb")
    in_force = _confine(settings)
    if "notebook" in settings:
        _cells(verdict, in_force, settings)
    (to_read, to_answer), (to_hear, to_ask) = os.pipe(), os.pipe()
    if os.fork() == 0:
        _answer(to_hear, to_answer, use_seccomp=guards.SECCOMP in settings["guards"])
    os.close(to_answer), os.close(to_hear)
    with open(0, encoding="utf-8") as stdin:
        task = json.load(stdin)
    _silence()
    if not _cut_off(in_force, settings):
        said = {"refused": NO_GUARD}
    else:
        ask, answers = os.fdopen(to_ask, "wb"), os.fdopen(to_read, "rb")
        why = probe(task) if task["probe"] else judge(task, ask, answers)
        said = {"passed": why is None, "why": (why or "")[:MAX_WORDS], "guards": in_force}
    verdict.write(json.dumps(said).encode())
    verdict.flush()
    os._exit(0)  # whatever the tests have left behind


def _confine(settings: dict[str, Any]) -> list[str]:
    """Everything that both processes have in common; returns the names of the guards in force."""
    guards.die_with_parent()
    guards.hide_memory()
    in_force = []
    user, group = os.geteuid(), os.getegid()
    if guards.NAMESPACES in settings["guards"] and guards.enter_namespaces():
        in_force.append(guards.NAMESPACES)
        if guards.small_disk(os.getcwd(), settings["total_bytes"], user=user, group=group):
            os.chdir(os.getcwd())  # into what is mounted there now
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


def _cut_off(in_force: list[str], settings: dict[str, Any]) -> bool:
    """The last guard, which stands when nothing more is to be opened. False where the network is still there."""
    if guards.SECCOMP in settings["guards"] and guards.deny_calls():
        in_force.append(guards.SECCOMP)
    return any(guard in in_force for guard in guards.CUT_THE_NETWORK)


def _cells(replies: BinaryIO, in_force: list[str], settings: dict[str, Any]) -> NoReturn:
    """The one process of a session, which has the two ends of its pipes."""
    requests = os.fdopen(os.dup(0), "rb")
    _silence()
    if not _cut_off(in_force, settings):
        send(replies, {"refused": NO_GUARD})
        os._exit(0)
    send(replies, {"guards": in_force})
    notebook.serve(requests, replies, characters=settings["notebook"]["characters"])


def _silence() -> None:
    """What is printed goes nowhere; there is nothing to read."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)


def _answer(to_hear: int, to_answer: int, *, use_seccomp: bool) -> NoReturn:
    """The process of the code under test, which has nothing but the two ends of its pipes."""
    guards.die_with_parent()
    _silence()
    os.dup2(to_hear, 3), os.dup2(to_answer, 4)
    os.closerange(5, 64)
    if use_seccomp:
        guards.deny_calls()
    serve(os.fdopen(3, "rb"), os.fdopen(4, "wb"))


main()
