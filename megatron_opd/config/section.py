"""What makes a class a section of the config."""

from __future__ import annotations

import dataclasses
from typing import TypeVar, dataclass_transform

import pydantic

_T = TypeVar("_T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls: type[_T]) -> type[_T]:
    """A frozen, keyword-only dataclass that pydantic validates strictly about names (unknown keys are errors)."""
    made = dataclasses.dataclass(frozen=True, kw_only=True, slots=True)(cls)
    made.__pydantic_config__ = pydantic.ConfigDict(  # type: ignore[attr-defined]
        extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
    return made
