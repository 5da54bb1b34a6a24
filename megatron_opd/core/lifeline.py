"""A process that ends when the one that started it does. Only the standard library: it runs before anything heavy."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

LAUNCHER = "MEGATRON_OPD_LAUNCHER"
"""The environment variable in which the local launcher tells its ranks its process id."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # opened here: not between fork and exec


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent dies. Only Linux can do that.

    SIGKILL by default, because no other signal ends a process that is stopped.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number)


def tie_to_launcher(environ: Mapping[str, str] = os.environ) -> None:
    """For a rank of the local launcher: end with it. Does nothing in other processes.

    Raises SystemExit when the launcher has died before the kernel was asked: the rank then has another parent.
    """
    if LAUNCHER not in environ:
        return
    end_with_parent()
    if environ[LAUNCHER] != str(os.getppid()):
        raise SystemExit(f"error: the launcher, process {environ[LAUNCHER]}, has ended")
