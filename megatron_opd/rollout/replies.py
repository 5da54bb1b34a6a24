"""What an environment says, checked before anything relies on it: it may be the user's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_opd.core.environment import Reply


def checked_reply(reply: Any) -> Reply:
    """The reply. Raises ValueError naming the field that is not what it must be."""
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
    return reply


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
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
