"""Runs inside each process of a run, before the program: has a fault happen at a point of the code.

FAULT in the environment is JSON: `rank` ("0", "1", …, or "launcher", or "any") says who; `point` ("module:Class.name")
and `call` say at which call of what, counted from 1; `do` says what happens there: {"signal": number}, or {"errno":
number} for an OSError, or {"error": name of a builtin exception}. A fault with `limit` ([name of an rlimit, value])
happens at once. The file `mark` appears when the fault has happened.
"""

import functools
import importlib
import json
import os
import resource
import signal
from pathlib import Path

EVERYBODY = "any"


def arm(fault):
    if fault["rank"] not in (EVERYBODY, os.environ.get("RANK", "launcher")):
        return
    if "limit" in fault:
        _limit(*fault["limit"])
        Path(fault["mark"]).touch()
    else:
        _wrap(fault)


def _limit(name, value):
    number = getattr(resource, name)
    if name == "RLIMIT_FSIZE":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails then, as on a full disk
    if name == "RLIMIT_AS":  # beyond what the process has now
        value += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(number, (value, resource.getrlimit(number)[1]))


def _wrap(fault):
    module, _, path = fault["point"].partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    inner, calls, mark = getattr(owner, name), 0, open(fault["mark"] + ".part", "ab", buffering=0)  # noqa: SIM115

    @functools.wraps(inner)
    def counted(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == fault["call"]:
            os.rename(mark.name, fault["mark"])
            _happen(fault["do"])
        return inner(*arguments, **named)

    setattr(owner, name, counted)


def _happen(do):
    if "signal" in do:
        os.kill(os.getpid(), do["signal"])
    elif "errno" in do:
        raise OSError(do["errno"], os.strerror(do["errno"]))
    else:
        raise getattr(__import__("builtins"), do["error"])(do.get("text", "injected"))


if "FAULT" in os.environ:
    arm(json.loads(os.environ["FAULT"]))
