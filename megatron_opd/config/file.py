"""Reads a run's description: a YAML file plus `section.key=value` overrides, every problem said at once.

An unknown setting is answered with the nearest known one. The way back, `to_dict` and `dump`, writes every default out.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import operator
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from megatron_opd.config import Config, methods, retired, yaml_text
from megatron_opd.config.checks import check
from megatron_opd.config.other_names import meant_by
from megatron_opd.config.schema import adapter, bounds, setting_at, without_empty
from megatron_opd.config.strict import one_each, what_to_write

_OUT_OF_BOUNDS = ("greater_than_equal", "greater_than", "less_than_equal", "less_than")


class ConfigError(ValueError):
    """One or more problems with the user's settings; the message lists all of them."""

    def __init__(self, problems: list[str], where: str = "config") -> None:
        self.problems = problems
        head = f"{where}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__("\n".join([head, *(f"  - {p}" for p in problems)]))


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides and check everything.

    Lists are addressed by index: `teachers.0.weight=0.5`. A text is taken as it is, another value is YAML.
    Raises ConfigError listing every problem.
    """
    return from_dict(read(path, overrides), where=str(path))


def read(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """A config's own settings, without its method's, not yet checked. Raises ConfigError where they are no mapping."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError([f"there is no such file: {path}"], where="config")
    try:
        text = path.read_text(encoding="utf-8")
        tree, twice = yaml_text.load(text), _set_twice(yaml_text.compose(text))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"not valid YAML: {error}"], where=str(path)) from None
    if twice:
        raise ConfigError(twice, where=str(path))
    if not isinstance(tree, dict):
        raise ConfigError(["expected a mapping of sections (run, student, teachers, …)"], where=str(path))
    for override in overrides:
        _apply_override(tree, override)
    return tree


def from_dict(tree: dict[str, Any], where: str = "config") -> Config:
    """Build and check a Config from plain dictionaries and lists, with the settings of its method beneath.

    Raises ConfigError listing every problem.
    """
    tree = without_empty(tree)
    tree = methods.overlaid(_preset(tree, where), tree)
    try:
        config = _validated(tree)
        problems = check(config)
    except pydantic.ValidationError as error:
        problems = [_explain(e) for e in one_each(error.errors())] + _further_problems(tree, error.errors())
    except (RecursionError, TypeError) as error:
        problems = [f"this is not plain data of texts, numbers, lists and mappings: {error}"]
    if problems:
        raise ConfigError(problems, where)
    return config


def _validated(tree: dict[str, Any]) -> Config:
    """A Config of plain data. As JSON, because pydantic is strict about scalars there and still takes mappings for
    sections. Raises pydantic.ValidationError; RecursionError and TypeError for what JSON does not have."""
    try:
        text = json.dumps(tree, default=os.fspath)
    except ValueError as error:  # a mapping that contains itself
        raise RecursionError(str(error)) from None
    return adapter().validate_json(text, strict=True)


def _preset(tree: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return methods.preset(tree.get("method", methods.DEFAULT))
    except ValueError as error:
        raise ConfigError([f"method: {error}"], where) from None


def method_in(tree: dict[str, Any]) -> list[str]:
    """The method of a config's own settings, and which of its settings hold and which are replaced, a line each."""
    taken, replaced = methods.taken_and_replaced(_preset(tree, "config"), tree)
    lines = [f"method {tree.get('method', methods.DEFAULT)}"]
    lines += [f"from the method: {', '.join(taken)}"] if taken else []
    return lines + ([f"of the method, replaced here: {', '.join(replaced)}"] if replaced else [])


def _further_problems(tree: dict[str, Any], errors: Sequence[Any]) -> list[str]:
    """What `check` finds where all that is wrong so far is numbers out of their bounds.

    It looks at the config with the default in place of such a number, or the nearest that is allowed where there is no
    default. Problems that name a setting which is out of bounds are left out.
    """
    if any(error["type"] not in _OUT_OF_BOUNDS for error in errors):
        return []
    tree = copy.deepcopy(tree)
    for error in errors:
        *parents, last = error["loc"]
        node = functools.reduce(operator.getitem, parents, tree)
        if isinstance(node, list) or last in setting_at(parents).get("required", []):
            node[last] = error["ctx"].get("ge", error["ctx"].get("le"))
        else:
            del node[last]
    names = "|".join(re.escape(".".join(map(str, error["loc"]))) for error in errors)
    return [problem for problem in check(_validated(tree)) if not re.search(rf"({names})\b", problem)]


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved config, every default written out, as plain data."""
    return dataclasses.asdict(config)


def not_defaults(section: Any) -> dict[str, Any]:
    """The settings of a config, or of a section, that have another value than their default, as plain data.

    Sections in a list are told apart by their places, so each has an entry; one without other settings is empty.
    """
    return _different(section, {field.name: _default(field) for field in dataclasses.fields(section)})


def _different(section: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """`not_defaults` where a section has other defaults in its place than its class has."""
    found: dict[str, Any] = {}
    for name, default in defaults.items():
        value = getattr(section, name)
        if value == default:
            continue
        if dataclasses.is_dataclass(value):
            own = dataclasses.is_dataclass(default)
            found[name] = _different(value, _settings_of(default)) if own else not_defaults(value)
        elif isinstance(value, list) and any(dataclasses.is_dataclass(entry) for entry in value):
            found[name] = [not_defaults(entry) for entry in value]
        else:
            found[name] = value
    return found


def _settings_of(section: Any) -> dict[str, Any]:
    """The settings of a section by name."""
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def dump(settings: dict[str, Any]) -> str:
    """A resolved config, as `to_dict` gives it, as YAML."""
    return yaml_text.dump(settings)


def record(settings: dict[str, Any], path: Path, write: Callable[[Path, str], None]) -> list[str] | None:
    """Have `write` write a resolved config, as `to_dict` gives it.

    Returns what is not as the last record had it, None when there was none to read.
    """
    try:
        before = yaml_text.load(path.read_text())
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):  # nothing but this message depends on it
        before = None
    write(path, dump(settings))
    return None if before is None else changes(before, settings)


def changes(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two resolved configs differ, a line each: `train.steps: 40 -> 80`."""
    if type(old) is type(new) and isinstance(old, dict | list):
        pairs = [dict(enumerate(tree)) if isinstance(tree, list) else tree for tree in (old, new)]
        keys = list(dict.fromkeys(key for tree in pairs for key in tree))
        absent = "(not set)"
        nested = [changes(*(tree.get(key, absent) for tree in pairs), f"{name}.{key}".lstrip(".")) for key in keys]
        return [line for lines in nested for line in lines]
    return [] if old == new else [f"{name}: {old} -> {new}"]


def _set_twice(node: yaml.Node | None, name: str = "", seen: tuple[yaml.Node, ...] = ()) -> list[str]:
    """The settings that a file has more than once, a line each: YAML takes the last one and forgets the others."""
    if not isinstance(node, yaml.SequenceNode | yaml.MappingNode) or any(node is parent for parent in seen):
        return []
    if isinstance(node, yaml.SequenceNode):
        return [line for i, child in enumerate(node.value) for line in _set_twice(child, f"{name}{i}.", (*seen, node))]
    found: list[str] = []
    lines: dict[str, int] = {}
    for key, child in node.value:
        here, line = f"{name}{key.value}", key.start_mark.line + 1
        if here in lines and key.value != "<<":
            found.append(f"{here} is set twice, in lines {lines[here]} and {line}")
        lines[here] = line
        found += _set_twice(child, f"{here}.", (*seen, node))
    return found


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError([f"'{override}' is not of the form section.key=value"], where="command line")
    *parents, last = dotted.split(".")
    node: Any = tree
    try:
        for part in parents:
            node = node[_number(node, part)] if isinstance(node, list) else _opened(node, part)
        value, twice = _value(dotted, text)
        node[_number(node, last) if isinstance(node, list) else last] = value
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError([f"cannot set {dotted}: {error}"], where="command line") from None
    if twice:
        raise ConfigError([line.partition(", in lines")[0] for line in twice], where="command line")


def _number(items: list[Any], part: str) -> int:
    """The place of a part of a setting's name in a list. Raises ValueError."""
    if re.fullmatch(r"0|[1-9][0-9]*", part) and int(part) < len(items):
        return int(part)
    raise ValueError(f"'{part}' is no place in this list, whose {len(items)} entries are numbered from 0")


def _value(dotted: str, text: str) -> tuple[Any, list[str]]:
    """The meaning of a text on the command line, and the settings that it has more than once. It means itself where the
    setting is a text, unless the whole of it is in quotes, and otherwise YAML. Raises yaml.YAMLError."""
    path = [int(part) if part.isdecimal() else part for part in dotted.split(".")]
    is_text = setting_at(path).get("type") == "string"
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if is_text and not is_quoted:
        return text, []
    return yaml_text.load_value(text), _set_twice(yaml_text.compose_value(text), f"{dotted}.")


def _opened(node: Any, part: str) -> Any:
    """What a mapping has under a name; an empty mapping where that was nothing."""
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _explain(error: Any) -> str:
    """One pydantic error as one sentence that names the setting, with the nearest name for an unknown one."""
    where = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            if advice := retired.advice_for_setting(error["loc"]):
                return f"{where} is no longer a setting: {advice}"
            near = meant_by(error["loc"])
            return f"{where}: unknown setting{f'; did you mean {near}?' if near else ''}"
        case "value_error":
            return f"{where}: {error['ctx']['error']}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{where}: required, but not set"
        case kind if kind in _OUT_OF_BOUNDS:
            setting = setting_at(error["loc"])
            why = f": {setting['why']}" if "why" in setting else ""
            return f"{where} {_refusal(bounds(setting))} {error['input']}{why}"
        case _:
            if advice := retired.advice_for_choice(error["loc"], error["input"]):
                return f"{where}: {error['input']} is refused: {advice}"
            got = "nothing" if error["input"] is None else repr(error["input"])
            return f"{where}: {error['msg']} (got {got}){what_to_write(error['type'], error['input'])}"


def _refusal(allowed: str) -> str:
    """Bounds as the words between a setting's name and its value."""
    if allowed == "at least 0":
        return "must not be negative, but is"
    return f"must {'lie' if allowed.startswith(('between', 'in')) else 'be'} {allowed}, not"
