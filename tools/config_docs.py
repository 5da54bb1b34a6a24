#!/usr/bin/env python3
"""Write docs/config.md from the sections in megatron_opd/config/, or check that it is current (--check).

Works on the source alone: the line of documentation under a field is a bare string that only the syntax tree keeps.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "megatron_opd" / "config"
TARGET = ROOT / "docs" / "config.md"
TOP = "Config"

HEAD = """\
# Settings

<!-- Written by tools/config_docs.py from megatron_opd/config/: change the lines there, not here. -->

A run is one YAML file with the sections below. On the command line every setting can be overridden as
`section.key=value`, entries of a list by their index: `optim.lr=2e-5`, `teachers.0.weight=0.5`. Unknown names and
values without meaning stop the run before anything is loaded, all of them listed at once.
"""


def sections(tree: ast.Module) -> dict[str, ast.ClassDef]:
    """The classes that are sections, by name."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {c.name: c for c in classes if any(ast.unparse(d) == "section" for d in c.decorator_list)}


def fields(section: ast.ClassDef) -> list[tuple[ast.AnnAssign, str]]:
    """The settings of a section with the line of documentation under each."""
    found = []
    following = [*section.body[1:], None]
    for node, after in zip(section.body, following, strict=True):
        if isinstance(node, ast.AnnAssign):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if not documented:
                name = f"{section.name}.{ast.unparse(node.target)}"
                raise SystemExit(f"{name} has no line of documentation under it")
            found.append((node, " ".join(str(after.value.value).split())))
    return found


def inner_section(field: ast.AnnAssign, known: dict[str, ast.ClassDef]) -> tuple[str, bool]:
    """Name of the section that the field holds ('' for a plain value), and whether it holds a list of them."""
    text = ast.unparse(field.annotation)
    inner = re.sub(r"^list\[(\w+)\]$", r"\1", text)
    return (inner if inner in known else ""), inner != text


def paths(known: dict[str, ast.ClassDef], name: str = TOP, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted path, section name) of every section below `name`, in the order of the source."""
    found = []
    for field, _ in fields(known[name]):
        inner, is_list = inner_section(field, known)
        if inner:
            path = f"{prefix}{ast.unparse(field.target)}" + (".N" if is_list else "")
            found += [(path, inner), *paths(known, inner, f"{path}.")]
    return found


def type_text(field: ast.AnnAssign) -> str:
    """The type in words that do not need Python; choices of a Literal one by one."""
    text = ast.unparse(field.annotation)
    if text.startswith("Literal["):
        choices = ast.literal_eval(f"({text.removeprefix('Literal[').removesuffix(']')},)")
        return " \\| ".join(f"`{choice}`" for choice in choices)
    words = {"str": "text", "int": "whole number", "float": "number", "bool": "`true` \\| `false`"}
    if mapping := re.fullmatch(r"dict\[str, (.+)\]", text):
        return f"mapping of name to {words.get(mapping[1], 'value')}"
    if many := re.fullmatch(r"list\[(\w+)\]", text):
        return f"list of {words[many[1]]}s".replace("texts", "text")
    return words[text]


def default_text(field: ast.AnnAssign) -> str:
    """The default as it would be written in YAML."""
    if field.value is None:
        return "required"
    text = ast.unparse(field.value)
    empty = {"dataclasses.field(default_factory=list)": "[]", "dataclasses.field(default_factory=dict)": "{}"}
    if text in empty:
        return f"`{empty[text]}`"
    if text.startswith("dataclasses.field("):
        return "its defaults"
    value = ast.literal_eval(field.value)
    text = str(value).lower() if isinstance(value, bool) else str(value) or '""'
    return f"`{re.sub(r'e-0+', 'e-', text)}`"


def escaped(text: str) -> str:
    """Text for a table cell: outside backticks, what looks like a tag is not one."""
    pieces = text.replace("|", "\\|").split("`")
    return "`".join(piece if i % 2 else piece.replace("<", "&lt;") for i, piece in enumerate(pieces))


def render(source: str) -> str:
    """The whole page."""
    known = sections(ast.parse(source))
    where: dict[str, list[str]] = {}
    for path, name in paths(known):
        where.setdefault(name, []).append(path)
    parts = [HEAD]
    for name, at in where.items():
        section = known[name]
        parts.append(f"## {', '.join(f'`{path}`' for path in at)}\n\n{escaped(ast.get_docstring(section) or '')}\n")
        parts.append("| setting | type | default | meaning |\n|---|---|---|---|")
        for field, meaning in fields(section):
            inner, is_list = inner_section(field, known)
            setting = ast.unparse(field.target)
            if inner:
                kind = f"list, see `{at[0]}.{setting}.N`" if is_list else f"section `{at[0]}.{setting}`"
            else:
                kind = type_text(field)
            parts.append(f"| `{setting}` | {kind} | {default_text(field)} | {escaped(meaning)} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def read_source() -> str:
    """All files that have sections, as one."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(SOURCE.glob("*.py")))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/config.md from megatron_opd/config/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is not current")
    parser.add_argument("--out", type=Path, default=TARGET, help="the page")
    options = parser.parse_args(arguments)
    page = render(read_source())
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
