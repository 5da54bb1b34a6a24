"""What makes a class a section of the config, and the bounds that its settings can have."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic

_T = TypeVar("_T")


def bound(*, why: str = "", **bounds: Any) -> Any:
    """Bounds of a setting for Annotated: `ge`, `gt`, `le`, `lt`, and what the error says beside them."""
    return pydantic.Field(**bounds, json_schema_extra={"why": why} if why else None)


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
