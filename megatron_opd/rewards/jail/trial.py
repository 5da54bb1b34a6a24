"""Two processes that the kernel confines: one runs the code under test, the other the tests, which call it over a pipe.

Because only plain values cross, the code under test can neither say that the tests passed, nor end them early, nor
change what they compare with, nor read them. The task is on standard input; the verdict, a JSON object, is all that is
said.
"""

from __future__ import annotations

import json
import os
from typing import Any, BinaryIO, NoReturn

import confinement
import guards
from answer import MAX_WORDS, serve
from judge import judge, probe


def run(settings: dict[str, Any], verdict: BinaryIO, *, no_guard: str) -> NoReturn:
    """Confine this process, split it in two, and write the verdict; `no_guard`: why nothing was run."""
    in_force = confinement.confine(settings)
    (to_read, to_answer), (to_hear, to_ask) = os.pipe(), os.pipe()
    if os.fork() == 0:
        _answer(to_hear, to_answer, use_seccomp=guards.SECCOMP in settings["guards"])
    os.close(to_answer), os.close(to_hear)
    with open(0, encoding="utf-8") as stdin:
        task = json.load(stdin)
    confinement.silence()
    if not confinement.cut_off(in_force, settings):
        said = {"refused": no_guard}
    else:
        ask, answers = os.fdopen(to_ask, "wb"), os.fdopen(to_read, "rb")
        why = probe(task) if task["probe"] else judge(task, ask, answers)
        said = {"passed": why is None, "why": (why or "")[:MAX_WORDS], "guards": in_force}
    verdict.write(json.dumps(said).encode())
    verdict.flush()
    os._exit(0)  # whatever the tests have left behind


def _answer(to_hear: int, to_answer: int, *, use_seccomp: bool) -> NoReturn:
    """The process of the code under test, which has nothing but the two ends of its pipes."""
    guards.die_with_parent()
    confinement.silence()
    os.dup2(to_hear, 3), os.dup2(to_answer, 4)
    os.closerange(5, 64)
    if use_seccomp:
        guards.deny_calls()
    serve(os.fdopen(3, "rb"), os.fdopen(4, "wb"))
