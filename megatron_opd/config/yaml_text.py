"""YAML 1.2 as its core schema reads it: `off`, `no` and `1:30` are texts, `1e-5` is a number.

PyYAML alone reads YAML 1.1, where they are false, false, 90 and a text. It still does the parsing; what a plain scalar
means is decided here. An integer with leading zeros (8 in YAML 1.1, 10 in 1.2) is a text, so that no setting takes it.
"""

from __future__ import annotations

import io
import re
from typing import Any

import yaml

_NULL, _BOOL, _INT, _FLOAT, _MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "merge"))
_SCALARS = {
    _NULL: r"~|null|Null|NULL|",
    _BOOL: r"true|True|TRUE|false|False|FALSE",
    _INT: r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+",
    _FLOAT: r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    _MERGE: "<<",
}
_RESOLVERS = [(tag, re.compile(rf"(?:{pattern})\Z")) for tag, pattern in _SCALARS.items()]
_COLLECTIONS = ("str", "seq", "map")
_HASH = "\ue000"
"""Stands for a `#` while a value is parsed that has no comments."""


def load(text: str) -> Any:
    """The one document of a text as plain data: mappings, lists, texts, numbers, true and false, None.

    Raises yaml.YAMLError for what is not YAML, and for tags of other kinds of data.
    """
    return _loader(text).get_single_data()


def compose(text: str) -> yaml.Node | None:
    """The nodes of a text, with the lines that they are on. Raises yaml.YAMLError."""
    return _loader(text).get_single_node()


def load_value(text: str) -> Any:
    """A value that stands alone, as on a command line: nothing in it is a comment. Raises yaml.YAMLError."""
    try:
        return _with_hashes(load(text.replace("#", _HASH)))
    except yaml.YAMLError as error:
        raise yaml.YAMLError(str(error).replace(_HASH, "#")) from None


def compose_value(text: str) -> yaml.Node | None:
    """The nodes of a value that stands alone. Raises yaml.YAMLError."""
    node = compose(text.replace("#", _HASH))
    _restore_hashes(node)
    return node


def dump(data: Any) -> str:
    """Plain data as YAML, keys in their order. Texts that YAML 1.1 or 1.2 would take for something else are quoted."""
    out = io.StringIO()
    dumper = yaml.SafeDumper(out, sort_keys=False, allow_unicode=True, default_flow_style=False)
    older = dumper.yaml_implicit_resolvers
    dumper.yaml_implicit_resolvers = {first: [*_RESOLVERS, *found] for first, found in older.items()} | {
        None: [*_RESOLVERS, *older.get(None, [])]
    }
    dumper.open()
    dumper.represent(data)
    dumper.close()
    return out.getvalue()


def _loader(text: str) -> yaml.SafeLoader:
    loader = yaml.SafeLoader(text)
    loader.yaml_implicit_resolvers = {None: _RESOLVERS}
    known = [f"tag:yaml.org,2002:{kind}" for kind in _COLLECTIONS]
    constructors = {tag: loader.yaml_constructors[tag] for tag in (_NULL, _BOOL, *known)}
    others = {_INT: _whole_number, _FLOAT: _number, None: loader.yaml_constructors[None]}
    loader.yaml_constructors = {**constructors, **others}  # type: ignore[misc, dict-item]
    return loader


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    try:
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    except ValueError as error:  # a number with thousands of digits, or a tag on what is none
        raise yaml.constructor.ConstructorError(None, None, f"not a whole number: {error}", node.start_mark) from None


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node)
    try:
        return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
    except ValueError as error:
        raise yaml.constructor.ConstructorError(None, None, f"not a number: {error}", node.start_mark) from None


def _restore_hashes(node: yaml.Node | None) -> None:
    todo, seen = [node], set[int]()  # a node may be in itself, by an alias
    while todo:
        node = todo.pop()
        if isinstance(node, yaml.ScalarNode):
            node.value = node.value.replace(_HASH, "#")
        elif isinstance(node, yaml.CollectionNode) and id(node) not in seen:
            seen.add(id(node))
            todo += [part for child in node.value for part in (child if isinstance(child, tuple) else (child,))]


def _with_hashes(value: Any) -> Any:
    match value:
        case str():
            return value.replace(_HASH, "#")
        case list():
            return [_with_hashes(entry) for entry in value]
        case dict():
            return {_with_hashes(key): _with_hashes(entry) for key, entry in value.items()}
    return value
