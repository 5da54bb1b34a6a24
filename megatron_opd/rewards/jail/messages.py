"""Python values as JSON lines and back: plain data only, so that nothing but a value crosses from code under test."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, BinaryIO

MAX_BYTES = 16 * 2**20
"""Longest message; a longer one ends the exchange."""
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset}


class Closed(Exception):
    """The other side has ended, or says what cannot be read."""


def to_plain(value: Any) -> Any:
    """JSON for a value; what has a type derived from a plain one counts as that. Raises TypeError for other objects."""
    if value is None or isinstance(value, bool):
        return value
    for simple in (int, float, str):
        if isinstance(value, simple):
            return simple.__str__(value) if simple is str else simple(value)
    if isinstance(value, list):
        return [to_plain(item) for item in list.__iter__(value)]
    for name, kind in (("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return {name: [to_plain(item) for item in kind.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[to_plain(key), to_plain(item)] for key, item in dict.items(value)]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    raise TypeError(f"a {type(value).__name__} is not plain data")


def from_plain(plain: Any) -> Any:
    """The value that `to_plain` was given, of the plain type."""
    if isinstance(plain, list):
        return [from_plain(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    if kind == "dict":
        return {from_plain(key): from_plain(item) for key, item in content}
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "range":
        return range(*content)
    return _SEQUENCES[kind]([from_plain(item) for item in content])


def send(stream: BinaryIO, message: dict[str, Any]) -> None:
    """One line. Raises Closed when nobody reads."""
    try:
        stream.write(json.dumps(message).encode() + b"\n")
        stream.flush()
    except OSError:
        raise Closed from None


def receive(stream: BinaryIO) -> dict[str, Any]:
    """The next line. Raises Closed at the end, and for what is no message."""
    line = stream.readline(MAX_BYTES)
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise Closed from None
    if not isinstance(message, dict):
        raise Closed
    return message
