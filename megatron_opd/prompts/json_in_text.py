"""A value of JSON somewhere in a text that a model wrote: strict, and never an exception."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_WORD = re.compile(r"\S")
"""A search from a place in the text copies nothing of it, however often it is asked."""
_DEEPEST = 32
"""Objects and lists within each other: more than arguments need, and few enough for whoever walks through them."""


def found_json(text: str, at: int) -> tuple[Any, int, str]:
    """(the value that stands at `at` behind blanks, where it ends, "") or (None, `at`, the problem in words).

    Stricter than Python: no NaN, no number that overflows, no half of a surrogate pair, nothing nested too deeply.
    """
    word = _WORD.search(text, at)
    begin = word.start() if word else len(text)
    try:
        value, end = _DECODER.raw_decode(text, begin)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return None, at, f"it is not valid JSON ({error.msg} at character {error.pos - begin + 1})"
    except RecursionError:
        return None, at, "it is not valid JSON (nested too deeply)"
    except UnicodeEncodeError:
        return None, at, "it is not valid JSON (half of a surrogate pair)"
    except ValueError as error:  # a number
        return None, at, f"it is not valid JSON ({error})"
    if not _is_flat(value, _DEEPEST):
        return None, at, f"it is nested more than {_DEEPEST} times"
    return value, end, ""


def _is_flat(value: Any, most: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(most > 0 and _is_flat(one, most - 1) for one in inner)


def _float(said: str) -> float:
    value = float(said)
    if math.isinf(value):
        raise ValueError(f"the number {said[:20]} is too large")
    return value


def _constant(said: str) -> float:
    raise ValueError(f"{said} is no number of JSON")


_DECODER = json.JSONDecoder(parse_float=_float, parse_constant=_constant)
