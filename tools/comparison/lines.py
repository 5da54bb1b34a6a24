"""The lines of JSON that finished cells of a comparison leave: a cell is run once for the same settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from megatron_opd.models.sampled_digest import sampled_digest


def read(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The finished cells with these settings, by name, the newest of equal ones; a line that was cut off is none. Lines
    may have more settings than are asked for."""
    found: dict[str, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if settings.items() <= line["settings"].items():
            found[line["cell"]] = line
    return found


def add(path: Path, line: Mapping[str, Any]) -> None:
    """A cell is finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.is_file() else b""
    cut_off = "" if before.endswith(b"\n") or not before else "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{cut_off}{json.dumps(line)}\n")


def told(value: Any) -> Any:
    """A setting as it is compared: a model by what it is, wherever it lies."""
    return sampled_digest(value) if isinstance(value, Path) else value


def digest(values: Any) -> str:
    """Eight hexadecimal digits that are others for other values."""
    return blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=4).hexdigest()
