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


def setting_at(path: Iterable[str | int]) -> dict[str, Any]:
    """The schema of what `path` leads to: a section, a setting, or a value in one; empty where there is none."""
    node = schema()
    for part in path:
        if isinstance(part, int):
            node = node.get("items", {})
        else:
            node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
        node = section_of(schema(), node) if "$ref" in node else node
    return node


def without_empty(tree: Any, node: dict[str, Any] | None = None) -> Any:
    """A config's settings, with sections, lists and mappings that have a name and nothing behind it as empty ones."""
    node = schema() if node is None else node
    node = section_of(schema(), node) if "$ref" in node else node
    if tree is None:
        return {"object": {}, "array": []}.get(node.get("type", ""))
    if isinstance(tree, list) and "items" in node:
        return [entry if entry is None else without_empty(entry, node["items"]) for entry in tree]
    if isinstance(tree, dict) and "properties" in node:
        known = node["properties"]
        return {name: without_empty(value, known.get(name, {})) for name, value in tree.items()}
    return tree


def bounds(setting: dict[str, Any]) -> str:
    """The numbers that a setting can have: `at least 1`, `between 0 and 1`; empty where it can have any."""
    low, above, high, below = (
        _number(setting[key]) if key in setting else ""
        for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
    )
    if low and high:
        return f"between {low} and {high}"
    if low and below:
        return f"in [{low}, {below})"
    ends = {"at least": low, "above": above, "at most": high, "below": below}
    return " and ".join(f"{words} {end}" for words, end in ends.items() if end)


def _number(value: float) -> str:
    exponent = abs(int(value)).bit_length() - 1
    if exponent > 30 and abs(value) == 2**exponent:
        return f"{'-' if value < 0 else ''}2^{exponent}"
    return f"{value:g}"
