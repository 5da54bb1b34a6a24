"""How big the house is and how its rooms hang together. Everything is counted in syntax trees."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from house_figures.source import Function, Module, assigned, constant, rooms_of_rules

EXTENSIONS = "tests/extensions"
_NAMED_FOR_USERS = ("config", "commands")
"""Rooms whose modules are named as users look for them."""
_LISTED = re.compile(r"^    ([\w/]+\.\w+)(?:$| )", re.MULTILINE)


def rooms(modules: Iterable[Module]) -> list[str]:
    """Top-level folders of the package with modules, its loose modules, __main__, and tools."""
    return sorted({module.room for module in modules if module.parts != ("__init__.py",)})


def loose(modules: Iterable[Module]) -> list[str]:
    """Modules at the package's root besides __init__ and __main__."""
    return [module.room for module in modules if module.is_loose]


def arrows(modules: Iterable[Module]) -> dict[str, set[str]]:
    """The rooms that each room imports from."""
    modules = list(modules)
    known = set(rooms(modules))
    found: dict[str, set[str]] = {room: set() for room in known}
    for module in modules:
        if module.room in known:
            found[module.room] |= {room for room, _ in module.imported_rooms() if room in known} - {module.room}
    return found


def longest_chain(edges: Mapping[str, set[str]]) -> list[str]:
    """The floors: the longest chain of rooms that import each other, the highest first. Rooms that import each other in
    a circle stand on one floor, "a = b"."""
    reach = {room: _reachable(room, edges) for room in edges}
    chains: dict[str, list[str]] = {}

    def chain(room: str) -> list[str]:
        if room not in chains:
            mates = {room} | {other for other in reach[room] if room in reach[other]}
            below = {other for mate in mates for other in edges[mate]} - mates
            longest = max((chain(other) for other in sorted(below)), key=len, default=[])
            chains.update({mate: [" = ".join(sorted(mates)), *longest] for mate in mates})
        return chains[room]

    return max((chain(room) for room in sorted(edges)), key=len, default=[])


def _reachable(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = edges[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def upward(modules: Iterable[Module], root: Path) -> list[str] | None:
    """Import statements from a room to one above it, by the order of the rules; None without an order."""
    listed = rooms_of_rules(root)
    if listed is None:
        return None
    order = {room: place for place, room in enumerate(listed)}
    return sorted(
        {
            f"{module.path.relative_to(root)}:{line} {module.room} -> {room}"
            for module in modules
            if module.room in order
            for room, line in module.imported_rooms()
            if order.get(room, -1) > order[module.room]
        }
    )


def takes_config(modules: Iterable[Module]) -> list[str]:
    """Functions of the package with a parameter annotated `Config`, alone or in a union."""
    return [
        f"{'/'.join(module.parts)}:{function.lineno} {function.name}"
        for module in modules
        if module.room != "tools"
        for function in module.functions()
        if any(_is_config(argument.annotation) for argument in _arguments(function))
    ]


def _is_config(annotation: ast.expr | None) -> bool:
    if isinstance(annotation, ast.BinOp):
        return _is_config(annotation.left) or _is_config(annotation.right)
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _is_config(ast.parse(annotation.value, mode="eval").body)
    name = annotation.attr if isinstance(annotation, ast.Attribute) else getattr(annotation, "id", None)
    return name == "Config"


def shared_names(modules: Iterable[Module]) -> dict[str, list[str]]:
    """Public classes, aliases of types and modules of the package that share a name with another one, and where.

    A file of sections in config/ may be called like the part that reads it, because a user looks for `answers:` in
    config/answers.py, and a developer for who answers in rollout/answers.py: there, one name is one thing. So is a
    command's, commands/report.py, and what it runs.
    """
    classes, files = defaultdict(set), defaultdict(set)
    for module in modules:
        if module.room == "tools":
            continue
        where = "/".join(module.parts)
        for name in _public(module.tree):
            classes[name].add(where)
        if not module.path.stem.startswith("__") and not (module.room in _NAMED_FOR_USERS and len(module.parts) == 2):
            files[module.path.stem].add(where)
    return {
        name: sorted(where) for names in (classes, files) for name, where in sorted(names.items()) if len(where) > 1
    }


def _public(tree: ast.Module) -> Iterable[str]:
    """Names of the classes and CamelCase aliases at a module's top level that do not begin with an underscore."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name
        yield from (name for name in assigned(node) if name[0].isupper() and not name.isupper())


def sizes(modules: Iterable[Module]) -> dict[str, int]:
    """Lines of a function (90th percentile and maximum) and of the largest file, and the most parameters.

    Counted as tests/test_architecture.py does: over the package and tools, from `def` to the last line; without `self`
    and `cls`; Triton kernels may have any number of parameters, because they take no objects. The percentile is over
    the package alone.
    """
    lengths, of_tools, parameters, files = [0], [0], [0], [0]
    for module in modules:
        files.append(len(module.path.read_text(encoding="utf-8").splitlines()))
        for function in module.functions():
            (of_tools if module.room == "tools" else lengths).append(
                (function.end_lineno or function.lineno) - function.lineno + 1
            )
            if not any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list):
                names = [argument.arg for argument in _arguments(function)]
                parameters.append(len([name for name in names if name not in ("self", "cls")]))
    lengths.sort()
    return {
        "function_lines_p90": lengths[round(0.9 * (len(lengths) - 1))],
        "function_lines_max": max(*lengths, *of_tools),
        "file_lines_max": max(files),
        "parameters_max": max(parameters),
    }


def _arguments(function: Function) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def touched(root: Path) -> dict[str, list[str]]:
    """The files to edit or add for each extension, as tests in folders called extensions declare; tests and docs apart.

    A test module there builds an extension. It lists the files in `TOUCHES = ["config/method.py", …]`, or in its
    docstring, an indented line each that begins with the path. Its name without `test_` is the extension's. A module
    of several extensions has `TOUCHES = {"metric": ["…"]}`.
    """
    found: dict[str, list[str]] = {}
    for path in sorted((root / "tests").glob("**/extensions/test_*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""
        files = constant(path, "TOUCHES") or _LISTED.findall(docstring)
        if isinstance(files, dict):
            found |= files
        elif files:
            found[path.stem.removeprefix("test_")] = list(files)
    return found
