"""The sandbox's program: code that nobody has read runs here, in processes that the kernel confines first.

Started by `sandbox.py` as `python -s -P -S <this directory> SETTINGS`. Standard input has a task with tests
(`trial.py`) or, with `notebook` in the settings, the cells of a session (`notebook.py`). What there is to say, a line
of JSON each, is all that goes to standard output.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, BinaryIO

import confinement

NO_GUARD = "the kernel offers neither user namespaces nor seccomp, so the network cannot be cut off"


def main() -> None:
    """Confine this process, and run what it is for."""
    settings = json.loads(sys.argv[1])
    sys.set_int_max_str_digits(0)
    del os.environ["PYTHONHASHSEED"]  # it has done its work
    replies = os.fdopen(os.dup(1), "wb")
    if "notebook" in settings:
        _cells(settings, replies)
    else:
        _task(settings, replies)


def _task(settings: dict[str, Any], replies: BinaryIO) -> None:
    import trial  # before the confinement, which hides this directory

    trial.run(settings, replies, no_guard=NO_GUARD)


def _cells(settings: dict[str, Any], replies: BinaryIO) -> None:
    import notebook
    from messages import send

    in_force = confinement.confine(settings)
    requests = os.fdopen(os.dup(0), "rb")
    confinement.silence()
    if not confinement.cut_off(in_force, settings):
        send(replies, {"refused": NO_GUARD})
        os._exit(0)
    send(replies, {"guards": in_force})
    notebook.serve(requests, replies, characters=settings["notebook"]["characters"])


main()
