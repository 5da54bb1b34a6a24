"""The examples: configs with comments, and the data and models that some of them need.

They are in `examples/` of the sources, and in a folder of that name within an installed package.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

FOLDER = "examples"
_NAMED = re.compile(rf"{FOLDER}/[\w./-]*\w")
"""A place in the folder, as configs and their comments name it."""
_WITH_DATA = ("LICENSE*", "README.md")
"""Files that go with the others of their folder."""


def folder() -> Path:
    """The folder of all examples."""
    package = Path(__file__).resolve().parents[1]
    installed = package / FOLDER
    return installed if installed.is_dir() else package.parent / FOLDER


def names() -> list[str]:
    """`quickstart`, `cluster/gkd`; those of folders follow the others."""
    found = (path.relative_to(folder()).with_suffix("") for path in folder().rglob("*.yaml"))
    return [str(name) for name in sorted(found, key=lambda name: (len(name.parts), name))]


def about(name: str) -> str:
    """The example in words: the first sentence of the comment at its top, behind the command."""
    _, _, text = _path(name).read_text(encoding="utf-8").partition("\n#\n")
    comment = " ".join(line.removeprefix("# ") for line in text.split("\n\n")[0].splitlines())
    return comment.split(". ")[0].removesuffix(".")


def files(name: str) -> list[Path]:
    """The example's config and whatever else of the examples it names, relative to `folder()`.

    Raises ValueError for an example that there is not.
    """
    text = _path(name).read_text(encoding="utf-8")
    named = [folder() / place.removeprefix(f"{FOLDER}/") for place in _NAMED.findall(text)]
    found = {_path(name), *(path for place in named for path in _below(place))}
    return sorted(path.relative_to(folder()) for path in found)


def write(name: str, here: Path) -> tuple[list[Path], list[Path]]:
    """Copy the example's files below `here`, to the places that its config has for them.

    Returns the files that were written, and those that were there and stay as they are. Raises ValueError for an
    example that there is not.
    """
    written, kept = [], []
    for path in files(name):
        target = here / FOLDER / path
        if target.exists():
            kept.append(target)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder() / path, target)
        written.append(target)
    return written, kept


def _path(name: str) -> Path:
    if name not in names():
        raise ValueError(f"there is no example {name!r}; there are {', '.join(names())}")
    return folder() / f"{name}.yaml"


def _below(place: Path) -> Iterator[Path]:
    """The files of a folder, or a file with what belongs to it; nothing where there is neither."""
    if place.is_dir():
        yield from (path for path in place.rglob("*") if path.is_file() and path.suffix != ".pyc")
    elif place.is_file():
        yield place
        for pattern in _WITH_DATA:
            yield from place.parent.glob(pattern)
