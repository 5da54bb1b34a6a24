"""The package as source: its modules, the rooms they are in, and who imports whom. Nothing of it is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = "megatron_opd"
RULES = "tests/test_architecture.py"
_ABOVE_ALL = ["__main__", "tools"]
"""Rooms that only import. The list of the rules has the package's folders alone."""
_NAMED_BY_OTHERS = "cpu_stand_ins"
"""The folder whose modules are called like the libraries that they replace."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Module:
    """A source file with its syntax tree. `parts` is its path below the package; a tool's begins with "tools"."""

    path: Path
    parts: tuple[str, ...]
    tree: ast.Module = field(repr=False)

    @property
    def room(self) -> str:
        """The top-level folder, or the name of a file that is in none."""
        return self.parts[0].removesuffix(".py")

    @property
    def is_loose(self) -> bool:
        return len(self.parts) == 1 and self.room not in ("__init__", "__main__")

    def functions(self) -> list[Function]:
        """All functions and methods, also inner ones."""
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    def imported_rooms(self) -> Iterator[tuple[str, int]]:
        """(room, line) of the package's rooms that it imports, also inside functions and for types alone."""
        for node in ast.walk(self.tree):
            for name in _imported(node, self.parts):
                package, _, rest = name.partition(".")
                if package == PACKAGE and rest:
                    yield rest.split(".")[0], node.lineno  # type: ignore[attr-defined]


def _imported(node: ast.AST, parts: tuple[str, ...]) -> list[str]:
    """Dotted names that the statement imports; relative ones are made absolute."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        here = [PACKAGE, *parts][: -node.level] if node.level else []
        return [".".join([*here, *filter(None, [node.module]), alias.name]) for alias in node.names]
    return []


def read(root: Path) -> list[Module]:
    """The modules of the package and of tools/ below `root`. Raises ValueError where there is no package."""
    if not (root / PACKAGE).is_dir():
        raise ValueError(f"{root} has no folder {PACKAGE}; give the root of a checkout with --root")
    found = []
    for folder, base in ((root / PACKAGE, root / PACKAGE), (root / "tools", root)):
        for path in sorted(folder.rglob("*.py")):
            if _NAMED_BY_OTHERS not in path.parts:
                parts = path.relative_to(base).parts
                found.append(Module(path, parts, ast.parse(path.read_text(encoding="utf-8"))))
    return found


def rooms_of_rules(root: Path) -> list[str] | None:
    """The rooms from the ground up, as ROOMS in tests/test_architecture.py lists them; None where it lists none."""
    rules = root / RULES
    if rules.is_file():
        listed = constant(rules, "ROOMS")
        if listed is not None:
            return [*listed, *_ABOVE_ALL]
    return None


def constant(path: Path, name: str) -> Any:
    """The literal that a module assigns to `name`; None where it does not."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if name in assigned(node):
            return ast.literal_eval(node.value)  # type: ignore[attr-defined]
    return None


def assigned(node: ast.stmt) -> list[str]:
    """The names that an assignment gives a value to."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
