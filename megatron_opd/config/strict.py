"""How a value of the wrong type is to be written, for the error that refuses it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_YES, _NO = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")


def what_to_write(kind: str, value: Any) -> str:
    """The end of an error that says what to write instead of `value`; empty where the error says it. `kind` is
    pydantic's."""
    match kind:
        case "int_type" | "int_from_float" | "int_parsing":
            number = _number(value)
            is_whole = number is not None and number == int(number)
            return f"; write {int(number)}" if is_whole and number is not None else "; write it in digits, e.g. 8"
        case "float_type":
            number = _number(value)
            return f"; write {number:g}" if number is not None else "; write it in digits, e.g. 1e-5"
        case "bool_type":
            word = str(value).lower()
            return "; write true" if word in _YES else "; write false" if word in _NO else "; write true or false"
        case "string_type" if isinstance(value, bool | int | float):
            return f'; write it in quotes: "{str(value).lower()}"'
        case "dataclass_type":
            return "; write its settings below it, each as name: value"
        case "list_type":
            return f"; write a list: [{value}]" if isinstance(value, str | int | float) else "; write a list"
    return ""


def one_each(errors: Sequence[Any]) -> list[Any]:
    """pydantic's errors, with one in place of four for a value that is neither true, false, a number nor a text."""
    places = {error["loc"][:-1] for error in errors if (error["loc"][-1:], error["type"]) == (("bool",), "bool_type")}
    plain = {"type": "plain_type", "msg": "Input should be true, false, a number or a text"}
    return [
        {**error, **plain, "loc": error["loc"][:-1]} if error["loc"][:-1] in places else error
        for error in errors
        if error["loc"][:-1] not in places or error["loc"][-1] == "bool"
    ]


def _number(value: Any) -> float | None:
    """The number that a text or number means beyond doubt: `010` and `1_000` are how others write 10 and 1000."""
    text = value.replace("_", "") if isinstance(value, str) else str(value)
    if isinstance(value, bool) or not re.fullmatch(r"[-+]?\d{1,18}(\.\d*)?([eE][-+]?\d{1,2})?", text):
        return None
    return float(text)
