"""Checks of an environment's replies, before anything relies on them: it may be the user's own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_opd.core.environment import Reply

_LARGEST = 1e300
"""Largest size of a number: sums are finite, too, and integers of Python that no float can hold are none."""


def checked_reply(reply: Any) -> Reply:
    """The reply, of whose messages nobody holds a part any more. Raises ValueError naming the field that is not what it
    must be, whatever the reply's parts do when they are read."""
    try:
        _check(reply)
        return replace(reply, messages=_plain(reply.messages))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"it cannot be read ({type(error).__name__})") from error


def _check(reply: Any) -> None:
    if not isinstance(reply, Reply):
        raise ValueError(f"`answer` must return a Reply, not {reply!r:.80}")
    if not isinstance(reply.is_done, bool):
        raise ValueError(f"is_done must be True or False, not {reply.is_done!r:.80}")
    if not _is_number(reply.reward):
        raise ValueError(f"reward must be a finite number, not {reply.reward!r:.80}")
    _check_numbers("info", reply.info)
    _check_numbers("failures", reply.failures)
    if not all(isinstance(count, int) and count >= 0 for count in reply.failures.values()):
        raise ValueError(f"failures must be counts, not {reply.failures!r:.80}")
    _check_messages(reply.messages)


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    try:
        return [json.loads(json.dumps(dict(message))) for message in messages]
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"messages must be JSON: {error}") from None


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"messages must be a list of messages, not {messages!r:.80}")
    for message in messages:
        has_texts = isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        if not has_texts:
            raise ValueError(f'a message must have texts as "role" and "content", not {message!r:.80}')


def _check_numbers(name: str, numbers: Any) -> None:
    if not isinstance(numbers, Mapping) or not all(isinstance(key, str) for key in numbers):
        raise ValueError(f"{name} must be numbers by name, not {numbers!r:.80}")
    for key, value in numbers.items():
        if not _is_number(value):
            raise ValueError(f"{name}[{key!r}] must be a finite number, not {value!r:.80}")


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -_LARGEST <= value <= _LARGEST and math.isfinite(value)
