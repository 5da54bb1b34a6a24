#!/usr/bin/env python3
"""How good the house is: the figures that tell whether the package stays easy to read and to extend.

    python tools/house.py                          # counted in the source, in a second
    python tools/house.py --reading                # and in one small training step, on a CPU in half a minute
    python tools/house.py --details floors         # what a figure is made of: the names or places that are counted
    python tools/house.py --root ../older --json   # of another checkout, for programs

rooms            top-level folders of megatron_opd/ with modules, loose modules, __main__, and tools
floors           rooms on the longest chain of imports; those inside functions and for types alone count
upward           import statements against the order of ROOMS in tests/test_architecture.py
loose            modules beside __init__.py and __main__.py at the package's root
config           functions with a parameter annotated `Config`: all settings, where a section would do
shared names     public classes, aliases of types and modules called like another one
function, file   lines and parameters, over the package and tools (p90: the package)
touched          files of the package to edit or add for an extension, as tests/extensions/test_*.py list them
way, everything  files and lines of functions to read from the command line to the first gradient (--reading):
                 `way` is `main` to the loop and its first step, `everything` has the set-up too
                 (`--reading --details way_functions` lists the functions of the way, the longest first)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from house_figures import figures, source
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
GOALS = {
    "rooms": 18,
    "floors": 8,
    "upward": 0,
    "loose": 0,
    "config": 25,
    "shared_names": 0,
    "function_lines_p90": 19,
    "function_lines_max": 60,
    "file_lines_max": 350,
    "parameters_max": 7,
    **{f"touched_{name}": 3 for name in ("divergence", "carrier", "term", "rollout_engine")},
    **{f"touched_{name}": 2 for name in ("metric", "weight_transport")},
    "way_files": 18,
    "way_lines": 800,
}
"""No figure should be larger."""
_READING_S = 600


def counted(root: Path) -> dict[str, Any]:
    """The figures of the source below `root`, by name: a number, or what is counted (its length is the figure)."""
    modules = source.read(root)
    edges = figures.arrows(modules)
    return {
        "rooms": figures.rooms(modules),
        "floors": figures.longest_chain(edges),
        "upward": figures.upward(modules, root),
        "loose": figures.loose(modules),
        "config": figures.takes_config(modules),
        "shared_names": figures.shared_names(modules),
        **figures.sizes(modules),
        **{f"touched_{extension}": files for extension, files in figures.touched(root).items()},
    }


def read_step(root: Path) -> dict[str, Any]:
    """The figures of a small training step. Raises ValueError when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "reading.json"
        command = [sys.executable, "-m", "house_figures.reading", str(root), str(out)]
        environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_READING_S)
        if done.returncode:
            raise ValueError(f"the training step failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        sets = json.loads(out.read_text())
    functions = sets.pop("functions")
    found = {
        f"{kind}_{unit}": lines if unit == "files" else sum(lines.values())
        for kind, lines in sets.items()
        for unit in ("files", "lines")
    }
    return {**found, "way_functions": functions}


def size(figure: Any) -> int | None:
    """The number that is compared with the goal."""
    return figure if figure is None or isinstance(figure, int) else len(figure)


def show(found: dict[str, Any]) -> None:
    table = Table("figure", "now", "goal")
    for name, figure in found.items():
        now, goal = size(figure), GOALS.get(name)
        over = now is not None and goal is not None and now > goal
        text = "no order of rooms" if now is None else str(now)
        table.add_row(name.replace("_", " "), f"[red]{text}[/]" if over else text, "" if goal is None else f"<= {goal}")
    Console().print(table)


def details(figure: Any) -> list[str]:
    """Lines that say what is counted."""
    if isinstance(figure, dict):
        return [f"{name}: {', '.join(where) if isinstance(where, list) else where}" for name, where in figure.items()]
    return list(figure) if isinstance(figure, list) else [str(figure)]


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reading", action="store_true", help="also count what a small training step enters")
    parser.add_argument("--details", metavar="FIGURE", help="print what this figure counts, line by line")
    parser.add_argument("--json", action="store_true", help="print numbers as JSON instead of a table")
    parser.add_argument("--root", type=Path, default=HERE.parent, help="checkout to look at (default: this one)")
    arguments = parser.parse_args(argv)
    try:
        found = counted(arguments.root.resolve())
        if arguments.reading:
            found |= read_step(arguments.root.resolve())
        if arguments.details and arguments.details not in found:
            raise ValueError(f"{arguments.details} is not a figure; figures: {', '.join(found)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps({name: size(figure) for name, figure in found.items()}, indent=2))
    elif arguments.details:
        print(*details(found[arguments.details]), sep="\n")
    else:
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
