"""Methods by name: settings that make one, beneath those of the config. Each is a file of megatron_opd/methods/."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from megatron_opd.config import yaml_text

_FOLDER = Path(__file__).resolve().parents[1] / "methods"
_SOURCE = "Source: "
DEFAULT = "opd"


def names() -> list[str]:
    """All methods, in the order of the alphabet."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def text(name: str) -> str:
    """The file of a method. Raises ValueError with the nearest name where there is none."""
    known = names()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"there is no method '{name}'; {hint}")
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def preset(name: str) -> dict[str, Any]:
    """The settings of a method. Raises ValueError as `text` does."""
    return yaml_text.load(text(name))


def about(name: str) -> tuple[str, str]:
    """A method's description in a line, and its source."""
    what, source = (line.removeprefix("# ") for line in text(name).splitlines()[:2])
    return what, source.removeprefix(_SOURCE)


def overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """The settings of both; where both have one, that of `above`. Lists are taken whole."""
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = overlaid(below[key], above[key])
    return merged


def taken_and_replaced(below: dict[str, Any], above: dict[str, Any], prefix: str = "") -> tuple[list[str], list[str]]:
    """The settings of a preset as `loss.beta: 0.5`: those that hold, and those that a config has another value for."""
    taken: list[str] = []
    replaced: list[str] = []
    for key, value in below.items():
        name, own = f"{prefix}{key}", above.get(key, {} if isinstance(value, dict) else value)
        if isinstance(value, dict) and isinstance(own, dict):
            inner = taken_and_replaced(value, own, f"{name}.")
            taken, replaced = taken + inner[0], replaced + inner[1]
        else:
            (taken if own == value else replaced).append(f"{name}: {yaml_text.dump(value).splitlines()[0]}")
    return taken, replaced
