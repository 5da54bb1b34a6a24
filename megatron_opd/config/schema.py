"""The settings as data, a JSON schema: their names, types, bounds, defaults and documentation."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pydantic

from megatron_opd.config import Config


@functools.cache
def adapter() -> pydantic.TypeAdapter[Config]:
    """What makes a Config of plain data; building it takes half a second."""
    return pydantic.TypeAdapter(Config)


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON schema of a whole config."""
    return adapter().json_schema()


def section_of(root: dict[str, Any], node: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of the section that the setting `node` holds, alone or as a list; None for a plain value."""
    reference = node.get("items", node).get("$ref")
    return root["$defs"][reference.rpartition("/")[2]] if reference else None


def settings_in(path: Iterable[str]) -> dict[str, Any]:
    """The settings of the section at `path` (indices of lists are skipped), by name; empty for a plain value."""
    section: dict[str, Any] | None = schema()
    for part in path:
        if not part.isdigit():
            section = section_of(schema(), (section or {}).get("properties", {}).get(part, {}))
    return (section or {}).get("properties", {})
