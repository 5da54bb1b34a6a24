"""What one reads to follow a run from the command line to the first gradient: functions that a small run enters.

Run as a module (`python -m house_figures.reading ROOT OUT`, in tools/), because it needs a fresh process: it trains one
step of the quickstart on one rank in that process, while sys.setprofile watches the main thread only.

Counted are functions of the package, also methods, generators, lambdas and comprehensions; not the bodies of modules
and classes, which run when they are imported. A function counts with all of its lines, from its first decorator to its
last line, with docstring and inner functions, and each line once, however often it runs. The clock begins in
`megatron_opd.__main__.main` and stops where the first call of torch.autograd.backward begins: the loss has made its
gradient by then, in the forward pass.

Two sets are counted. `everything` are all functions entered by then, set-up too: reading and checking the config, the
models and the data, building and loading the student and the teachers. `way` is what one reads to know what a step
does: the functions on the stack at that moment, from `main` down, and all that was entered since the loop began its
step. The loop is the file of the outermost function `train` on that stack, and its step is that file's `step`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType

from house_figures.source import PACKAGE, constant

_BACKWARD = os.path.join("torch", "autograd", "__init__.py")
_LOOP, _STEP = "train", "step"


class Watch:
    """For sys.setprofile: notes which functions of the package are entered, until the first backward pass."""

    def __init__(self, package: Path) -> None:
        self.prefix = f"{package}{os.sep}"
        self.calls = 0
        self.last_entered: dict[CodeType, int] = {}
        self.stack: list[CodeType] = []
        """The package's functions that were running when the backward pass began, the innermost one first."""

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call":
            return
        if self._is_ours(code):
            self.calls += 1
            self.last_entered[code] = self.calls
        elif code.co_name == "backward" and code.co_filename.endswith(_BACKWARD):
            sys.setprofile(None)
            at: FrameType | None = frame
            while at is not None:
                self.stack += [at.f_code] if self._is_ours(at.f_code) else []
                at = at.f_back

    def _is_ours(self, code: CodeType) -> bool:
        return code.co_filename.startswith(self.prefix) and bool(code.co_flags & inspect.CO_OPTIMIZED)

    def way(self) -> list[CodeType]:
        """The stack, and what was entered since the loop began its step. Raises ValueError without such a step."""
        loop = next((code.co_filename for code in reversed(self.stack) if code.co_name == _LOOP), None)
        steps = [code for code in self.stack if code.co_filename == loop and code.co_name.strip("_") == _STEP]
        if not steps:
            names = " in ".join(code.co_name for code in self.stack)
            raise ValueError(
                f"no function `{_STEP}` in the file of `{_LOOP}` runs at the first backward pass, but {names}"
            )
        since = self.last_entered[steps[0]]
        return [*self.stack, *(code for code, last in self.last_entered.items() if last >= since)]


def lines(codes: Iterable[CodeType]) -> dict[str, int]:
    """Lines of the functions by file."""
    found: dict[str, set[int]] = defaultdict(set)
    for code in codes:
        end = _ends(code.co_filename).get(code.co_firstlineno)
        inside = {line for _, _, line in code.co_lines() if line}  # of a lambda or a comprehension
        found[code.co_filename] |= set(range(code.co_firstlineno, end + 1)) if end else inside
    return {name: len(numbers) for name, numbers in sorted(found.items(), key=lambda item: -len(item[1]))}


def functions(codes: Iterable[CodeType]) -> dict[tuple[str, str], int]:
    """Lines of each function with a name, by file and name, the longest first."""
    found = {}
    for code in codes:
        end = _ends(code.co_filename).get(code.co_firstlineno)
        if end:
            found[code.co_filename, code.co_qualname] = end - code.co_firstlineno + 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))


@cache
def _ends(path: str) -> dict[int, int]:
    """The last line of each function of a file, by its first one, which is that of its first decorator."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {min([f.lineno, *(d.lineno for d in f.decorator_list)]): f.end_lineno or f.lineno for f in functions}


def small_run(root: Path) -> tuple[list[str], dict[str, str]]:
    """(arguments of the command line, environment) of the tests' small run on one rank."""
    program = next(root.glob("tests/**/program.py"))
    known = {name: constant(program, name) for name in ("CONFIG", "SMALL", "ALONE")}
    return ["train", known["CONFIG"], *known["SMALL"], "train.steps=1"], known["ALONE"]


def main(root: Path, out: Path) -> int:
    """Run the step and write {set: {file: lines}}, and as "functions" those of the way, to `out`."""
    sys.path.insert(0, str(root))
    os.chdir(root)
    arguments, environment = small_run(root)
    os.environ.update(environment)
    program = importlib.import_module(f"{PACKAGE}.__main__")
    watch = Watch(root / PACKAGE)
    with tempfile.TemporaryDirectory() as run_dir:
        sys.setprofile(watch)
        code = program.main([*arguments, f"run.dir={run_dir}/run"])
        sys.setprofile(None)
    if code or not watch.stack:
        raise SystemExit(code or "the run made no backward pass")
    sets = {"way": watch.way(), "everything": watch.last_entered}
    below = {
        kind: {os.path.relpath(f, root / PACKAGE): n for f, n in lines(codes).items()} for kind, codes in sets.items()
    }
    named = functions(watch.way()).items()
    below["functions"] = {f"{os.path.relpath(f, root / PACKAGE)}: {name}": n for (f, name), n in named}
    out.write_text(json.dumps(below))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2])))
