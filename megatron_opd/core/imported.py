"""Classes and functions of the user's own, by their import path."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def imported(path: str, *, what: str, kind: str) -> Callable[..., Any]:
    """The class or function of `module:name`; the working directory is searched, too.

    `what` and `kind` say in an error what it is for, and whether a class or a function. Raises ValueError when it is
    not there.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:  # the console script has its own directory there instead
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        is_absent = error.name in _parents(module)
        where = "; it is looked for in the working directory and on PYTHONPATH" if is_absent else ""
        raise ValueError(f"{what} '{path}': {module} cannot be imported: {error!r}{where}") from error
    except (Exception, SystemExit) as error:  # a script that ends when it is done must not end the run, as a success
        raise ValueError(f"{what} '{path}': {module} cannot be imported: {error!r}") from error
    if not callable(found):
        raise ValueError(f"{what} '{path}': {module} has no {kind} {name}".rstrip())
    return found


def _parents(module: str) -> list[str]:
    """`a.b` and `a` for `a.b`: the modules without which it is not there."""
    return [module, *(module[:at] for at, letter in enumerate(module) if letter == ".")]
