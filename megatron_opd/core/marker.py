"""`loop.json`, the file that makes a directory a checkpoint: its text, and what one must hold to be read.

It carries a checksum of the rest of it, so that a flipped bit or an edit is found whatever it hit. People who do mean
an edit take the checksum out. Files of older versions have none.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic

from megatron_opd.core.run_dir import MARKER

CHECKSUM = "checksum"
_AtLeastOne = Annotated[int, pydantic.Field(ge=1)]
_T = TypeVar("_T")
_Fact = str | int | float | bool | list[str] | None


class DamagedMarker(ValueError):
    """loop.json is not what a save writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Own:
    """The keys that every checkpoint has; the others belong to who saves one."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    step: _AtLeastOne
    student: dict[str, _Fact]
    """Facts of the model, the optimizer and the adapters that it was saved with."""
    layout: Annotated[list[_AtLeastOne], pydantic.Field(min_length=3, max_length=4)]
    """Ranks: tensor, pipeline, data and, where there is more than one, context."""


def text(loop: dict[str, Any]) -> str:
    """The file's text, with the checksum."""
    return json.dumps({**loop, CHECKSUM: _checksum(loop)}, indent=1)


def read(checkpoint: Path) -> dict[str, Any]:
    """The contents of a checkpoint's loop.json, without the checksum.

    Raises DamagedMarker naming the key, and what is wrong with it, where that is not what a save has written.
    """
    try:
        content = (checkpoint / MARKER).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DamagedMarker(f"{MARKER} is not text") from None
    except OSError as error:
        raise DamagedMarker(f"{MARKER} cannot be opened: {error.strerror}") from None
    try:
        loop = json.loads(content, object_pairs_hook=_once)
    except RecursionError:
        raise DamagedMarker(f"{MARKER} is nested too deeply") from None
    except ValueError as error:
        raise DamagedMarker(f"{MARKER} is not JSON as a save writes it: {error}") from None
    if not isinstance(loop, dict):
        raise DamagedMarker(f"{MARKER} must hold an object, not {_shown(loop)}")
    written = loop.pop(CHECKSUM, None)
    own = {name: loop[name] for name in _Own.__dataclass_fields__ if name in loop}
    step = validated(_Own, own).step
    named = re.fullmatch(r"step_([0-9]+)", checkpoint.name)
    if named and int(named[1]) != step:
        raise DamagedMarker(f"{MARKER}: step is {step}, but the directory is {checkpoint.name}")
    if written is not None and written != _checksum(loop):
        raise DamagedMarker(
            f"{MARKER} is not as it was written, by its checksum; if you edited it on purpose, take the line"
            f' "{CHECKSUM}" out too'
        )
    return loop


def others(loop: dict[str, Any]) -> dict[str, Any]:
    """The keys that belong to who saved it."""
    return {name: value for name, value in loop.items() if name not in _Own.__dataclass_fields__}


def validated(kind: type[_T], data: Any) -> _T:
    """Data out of loop.json as an instance of a dataclass, strictly. Raises DamagedMarker naming the first keys that do
    not fit it."""
    try:
        return _adapter(kind).validate_json(json.dumps(data), strict=True)
    except pydantic.ValidationError as error:
        found = list({sentence.split()[0]: sentence for sentence in map(_explain, reversed(error.errors()))}.values())
        found.reverse()  # the first of each key, in their order
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise DamagedMarker(f"{MARKER}: {'; '.join(found[:3])}{more}") from None


@functools.cache
def _adapter(kind: type[_T]) -> pydantic.TypeAdapter[_T]:
    return pydantic.TypeAdapter(kind)


def _explain(error: Any) -> str:
    """One problem as a sentence that begins with the key."""
    parts = [str(part) for part in error["loc"]]
    if error["type"] in ("missing", "missing_argument"):
        return f"{'.'.join(parts)} is missing"
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{'.'.join(parts)} is not a key that this version knows (a newer version writes others)"
    found = error["input"]
    if parts[0] == "student" and len(parts) > 2:  # a fact may be of several types, which all complain
        parts, found = parts[:2], error["input"]
        return f"{'.'.join(parts)} is {_shown(found)}, which no save writes"
    return f"{'.'.join(parts)} is {_shown(found)}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _shown(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _checksum(loop: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(loop, sort_keys=True).encode()).hexdigest()
