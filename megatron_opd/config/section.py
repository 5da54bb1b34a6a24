"""The decorator that makes a class a section of the config, and the bounds that its settings can have."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic

_T = TypeVar("_T")


def bound(*, why: str = "", **bounds: Any) -> Any:
    """Bounds of a setting for Annotated: `ge`, `gt`, `le`, `lt`, and what the error says beside them."""
    return pydantic.Field(**bounds, json_schema_extra={"why": why} if why else None)


HUB = "hf:"
"""Begins the path of a prompt source that is a data set of the Hugging Face hub."""


def expanded(path: str) -> str:
    """A path with `~`, `~user` and `$VAR` replaced, as a shell does. Raises ValueError for a user or variable that does
    not exist: the path would lead to a directory of that name."""
    start = len(HUB) if path.startswith(HUB) else 0
    if unset := [name for name in re.findall(r"\$(?:(\w+)|\{(\w+)\})", path) if "".join(name) not in os.environ]:
        raise ValueError(f"the environment variable {''.join(unset[0])} in {path!r} is not set")
    found = os.path.expanduser(os.path.expandvars(path[start:]))
    if path[start:].startswith("~") and found.startswith("~"):
        raise ValueError(f"the home directory in {path!r} is not known; write it out, or ./{path} for such a name")
    return path[:start] + found


FilePath = Annotated[str, pydantic.AfterValidator(expanded), pydantic.Field(json_schema_extra={"format": "path"})]
"""A setting that names a file or directory; `~` and `$VAR` are replaced when a config is read."""
AtLeastOne = Annotated[int, bound(ge=1)]
Count = Annotated[int, bound(ge=0)]
NotNegative = Annotated[float, bound(ge=0)]
Positive = Annotated[float, bound(gt=0)]
Fraction = Annotated[float, bound(ge=0, le=1)]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls: type[_T]) -> type[_T]:
    """A frozen, keyword-only dataclass that pydantic validates strictly about names (unknown keys are errors)."""
    made = dataclasses.dataclass(frozen=True, kw_only=True, slots=True)(cls)
    made.__pydantic_config__ = pydantic.ConfigDict(  # type: ignore[attr-defined]
        extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
    return made
