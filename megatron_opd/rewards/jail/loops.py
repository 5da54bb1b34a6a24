"""asyncio without sockets: its loop wakes itself through a pair of sockets, which the jail does not allow.

Nothing else may wake a loop here but its own timers and callbacks, so it needs none.
"""

from __future__ import annotations

import sys
from collections.abc import Coroutine
from typing import Any


def prepare(source: str) -> None:
    """Make event loops work for a program that may use some; importing asyncio takes a while, so for no other."""
    if "async" in source and "asyncio.selector_events" not in sys.modules:
        import asyncio.selector_events

        loop = asyncio.selector_events.BaseSelectorEventLoop
        loop._make_self_pipe = loop._close_self_pipe = lambda self: None  # type: ignore[method-assign,attr-defined]
        loop._csock = None  # type: ignore[attr-defined]


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine."""
    prepare("async")
    import asyncio

    return asyncio.run(coroutine)
