#!/usr/bin/env python3
"""Write docs/config.md from the sections in megatron_opd/config/, or check that it is current (--check)."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import pydantic

from megatron_opd.config import Config
from megatron_opd.config.schema import bounds, section_of

TARGET = Path(__file__).resolve().parents[1] / "docs" / "config.md"

HEAD = """\
# Settings

<!-- Written by tools/config_docs.py from megatron_opd/config/: change the lines there, not here. -->

A run is one YAML file with the sections below. On the command line every setting can be overridden as
`section.key=value`, entries of a list by their index: `optim.lr=2e-5`, `teachers.0.weight=0.5`. Unknown names and
values without meaning stop the run before anything is loaded, all of them listed at once.

Values are YAML 1.2, and types are strict. `off`, `no` and `1:30` are texts, `true` and `false` are the only switches,
and a number is written in digits: `1e-5`, `10`, not `010`. A text that looks like a number or a switch needs quotes. A
`#` in an override is part of the value. A section with nothing behind its name has its defaults. In a path, `~` and
`$VAR` are replaced; a variable that is not set is an error.
"""
TABLE = "| setting | type | default | meaning |\n|---|---|---|---|"

WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true` \\| `false`"}

Schema = dict[str, Any]


def paths(root: Schema, section: Schema, prefix: str = "") -> list[tuple[str, Schema]]:
    """(dotted path, section) of every section below `section`, in the order of the source."""
    found = []
    for name, setting in section["properties"].items():
        if inner := section_of(root, setting):
            path = f"{prefix}{name}" + (".N" if "items" in setting else "")
            found += [(path, inner), *paths(root, inner, f"{path}.")]
    return found


def type_text(setting: Schema) -> str:
    """The type in words that do not need Python; choices one by one, numbers with their bounds."""
    if "enum" in setting:
        return " \\| ".join(f"`{choice}`" for choice in setting["enum"])
    if setting["type"] == "object":
        value = setting["additionalProperties"]
        return f"mapping of name to {type_text(value) if 'type' in value else 'value'}"
    if setting["type"] == "array":
        return f"list of {type_text(setting['items'])}".replace("number", "numbers")
    if setting.get("format") == "path":
        return "path"
    allowed = bounds(setting)
    return WORDS[setting["type"]] + (f", {allowed}" if allowed else "")


def default_text(section: Schema, name: str) -> str:
    """The default as it would be written in YAML."""
    if name in section.get("required", []):
        return "required"
    setting = section["properties"][name]
    if "$ref" in setting:
        return "its defaults"
    if "default" not in setting:
        return "`[]`" if setting["type"] == "array" else "`{}`"
    value = setting["default"]
    text = str(value).lower() if isinstance(value, bool) else str(value) or '""'
    return f"`{re.sub(r'e-0+', 'e-', text)}`"


def escaped(text: str) -> str:
    """Text for a table cell: outside backticks, what looks like a tag is not one."""
    pieces = text.replace("|", "\\|").split("`")
    return "`".join(piece if i % 2 else piece.replace("<", "&lt;") for i, piece in enumerate(pieces))


def row(section: Schema, name: str, inner_path: str) -> str:
    """A setting as a row; `inner_path` is where the page has the section that it holds, empty for a plain value."""
    setting = section["properties"][name]
    if "description" not in setting:
        raise SystemExit(f"{section['title']}.{name} has no line of documentation under it")
    kind = type_text(setting) if not inner_path else f"section `{inner_path}`"
    if "items" in setting and inner_path:
        kind = f"list, see `{inner_path}.N`"
    meaning = escaped(" ".join(setting["description"].split()))
    return f"| `{name}` | {kind} | {default_text(section, name)} | {meaning} |"


def render(config: type) -> str:
    """The whole page for a config whose class is `config`."""
    root = pydantic.TypeAdapter(config).json_schema()
    where: dict[str, list[str]] = {}
    sections = {}
    for path, section in paths(root, root):
        where.setdefault(section["title"], []).append(path)
        sections[section["title"]] = section
    parts = [HEAD]
    plain = [row(root, name, "") for name, setting in root["properties"].items() if not section_of(root, setting)]
    if plain:
        parts += [f"## At the top\n\n{TABLE}", *plain, ""]
    for title, section in sections.items():
        at = where[title]
        parts.append(f"## {', '.join(f'`{path}`' for path in at)}\n\n{escaped(section.get('description', ''))}\n")
        parts.append(TABLE)
        for name, setting in section["properties"].items():
            parts.append(row(section, name, f"{at[0]}.{name}" if section_of(root, setting) else ""))
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/config.md from megatron_opd/config/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is not current")
    parser.add_argument("--out", type=Path, default=TARGET, help="the page")
    options = parser.parse_args(arguments)
    page = render(Config)
    if options.check:
        current = options.out.is_file() and options.out.read_text(encoding="utf-8") == page
        if not current:
            print(f"{options.out} is not current; run: python tools/config_docs.py", file=sys.stderr)
        return 0 if current else 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
