"""Whether a call is one of a tool that there is, with arguments that fit its JSON schema; if not, why, in words.

It knows what schemas of functions are made of: type, enum, items, properties, required, additionalProperties, anyOf,
nullable, and bounds of numbers. What else a schema says is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_opd.core.environment import Call, Message, Schema
from megatron_opd.rollout.environments.tool import Outcome

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (dict,),
    "null": (type(None),),
}


def refused(call: Call, schemas: Mapping[str, Schema]) -> Outcome | None:
    """The outcome of a call that no tool is asked to run, by the schemas of the tools by name; None for all others."""
    if call.problem:
        return Outcome(text=f"Error: the call cannot be read: {call.problem}", failure="not_json")
    if call.name not in schemas:
        text = f"Error: there is no tool {call.name[:80]!r}; there are: {', '.join(schemas) or 'none'}"
        return Outcome(text=text, failure="unknown_tool")
    problem = problem_with(call.arguments, schemas[call.name]["function"].get("parameters", {}))
    return Outcome(text=f"Error: {problem}", failure="bad_arguments") if problem else None


def answer_to(call: Call, text: str) -> Message:
    """The message that tells the policy what came of its call."""
    return {"role": "tool", "name": call.name, "tool_call_id": call.id, "content": text}


def problem_with(arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """The first fault of the arguments, by the schema of the parameters; empty where they fit."""
    properties = parameters.get("properties", {})
    unknown = sorted(str(name) for name in arguments if name not in properties)
    if unknown and not parameters.get("additionalProperties", False):
        return f"there is no argument {unknown[0][:80]!r}; there are: {', '.join(properties) or 'none'}"
    return _of_object(arguments, parameters, "")


def _of_object(value: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> str:
    for name in schema.get("required", []):
        if name not in value:
            return f"the argument {_inside(where, name)!r} is missing"
    others = schema.get("additionalProperties", {})
    for name, inner in value.items():
        expected = schema.get("properties", {}).get(name, others)
        found = _of(inner, expected, _inside(where, name)) if isinstance(expected, Mapping) else ""
        if found:
            return found
    return ""


def _inside(where: str, name: object) -> str:
    return f"{where}.{str(name)[:80]}" if where else str(name)[:80]


def _of(value: Any, schema: Mapping[str, Any], where: str) -> str:
    if value is None and schema.get("nullable"):
        return ""
    if choices := schema.get("anyOf"):
        problems = [_of(value, choice, where) for choice in choices]
        return "" if "" in problems else problems[0]
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"the argument {where!r} must be of type {' or '.join(kinds)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"the argument {where!r} must be one of {', '.join(map(repr, schema['enum']))}"
    return _of_content(value, schema, where)


def _is(value: Any, kind: str) -> bool:
    is_wrong_bool = isinstance(value, bool) and kind != "boolean"
    return not is_wrong_bool and isinstance(value, _TYPES.get(kind, (object,)))


def _of_content(value: Any, schema: Mapping[str, Any], where: str) -> str:
    if isinstance(value, Mapping):
        return _of_object(value, schema, where)
    if isinstance(value, Sequence) and not isinstance(value, str) and isinstance(schema.get("items"), Mapping):
        found = (_of(inner, schema["items"], f"{where}[{at}]") for at, inner in enumerate(value))
        return next(filter(None, found), "")
    if isinstance(value, int | float):
        if "minimum" in schema and value < schema["minimum"]:
            return f"the argument {where!r} must be at least {schema['minimum']}"
        if "maximum" in schema and value > schema["maximum"]:
            return f"the argument {where!r} must be at most {schema['maximum']}"
    return ""
