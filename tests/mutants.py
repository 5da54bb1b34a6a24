"""Mutants: small faults put into the package one at a time, each of which the tests named beside it must notice.

    python tests/mutants.py                    # all of them; those that were killed already are not run again
    python tests/mutants.py loss/ NAME         # those whose name contains one of the words
    python tests/mutants.py --fresh --list

`mutants.toml` is the list. A mutant is applied in a copy of the tree, never here, and its tests run there. `killed`: a
test failed. `lived`: all of them passed, so a test is missing. `stale`: its text is no longer there exactly once.
`broken`: pytest could not run the tests, or they do not pass without the mutant either. `hung`: they did not end. What
was found is kept in `runs/mutants.json` and holds as long as the mutant, the file that it changes and its tests are the
same. The exit code is 1 unless every mutant was killed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests/mutants.toml"
FOUND = ROOT / "runs/mutants.json"
_FAST = "not slow and not gpu and not sglang and not slurm"
"""What `make test` runs: it must notice."""
_VERDICTS = {0: "lived", 1: "killed"}
"""By pytest's exit code; any other one means that it could not run the tests."""


@dataclass(frozen=True)
class Mutant:
    """One fault."""

    name: str
    """The room and what is wrong."""
    file: str
    """Below `megatron_opd`."""
    old: str
    """What is there now, exactly once."""
    new: str
    tests: tuple[str, ...]
    """Files or node ids of pytest; one of their tests at least must fail."""

    def apply(self, root: Path) -> None:
        """Put the fault into the tree at `root`. Raises ValueError where `old` is not there exactly once."""
        path = root / "megatron_opd" / self.file
        text = path.read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: the text is {count} times in megatron_opd/{self.file}, not once")
        path.write_text(text.replace(self.old, self.new))


def read() -> list[Mutant]:
    """The list."""
    with LIST.open("rb") as file:
        rows = tomllib.load(file)["mutant"]
    return [Mutant(**{**row, "tests": tuple(row["tests"])}) for row in rows]


class Tree:
    """A copy of the tracked and new files of this tree, in which mutants live."""

    def __init__(self, directory: Path) -> None:
        self.root = directory
        self._stamp = int(time.time())
        self._sound: dict[tuple[str, ...], str] = {}
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True, timeout=120,
        ).stdout  # fmt: skip
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, directory / name)

    @contextmanager
    def with_fault(self, mutant: Mutant) -> Iterator[None]:
        """The tree with this mutant in it. Raises ValueError for one that is stale."""
        path = self.root / "megatron_opd" / mutant.file
        original = path.read_bytes()
        mutant.apply(self.root)
        self._touch(path)
        try:
            yield
        finally:
            path.write_bytes(original)
            self._touch(path)

    def without_fault(self, tests: tuple[str, ...], timeout_s: float) -> str:
        """What is wrong with tests that do not pass without any mutant; nothing where they pass."""
        if tests not in self._sound:
            code, said = self.run(tests, timeout_s)
            self._sound[tests] = said.strip().splitlines()[-1] if code else ""
        return self._sound[tests]

    def run(self, tests: Sequence[str], timeout_s: float) -> tuple[int, str]:
        """(pytest's exit code, the end of what it said). Raises subprocess.TimeoutExpired."""
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
            child = os.fork()
            if child == 0:
                self._become_pytest(tests, said.fileno())
            code = _exit_code(child, timeout_s)
            said.seek(0)
            return code, said.read()[-4000:]

    def _become_pytest(self, tests: Sequence[str], output: int) -> NoReturn:
        """This process, a fork, runs the tests in the tree and ends."""
        code = 70
        try:
            os.setsid()
            os.chdir(self.root)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ["PYTHONPATH"] = str(self.root)
            here = [path for path in sys.path if not Path(path or ".").resolve().is_relative_to(ROOT / "tests")]
            sys.path[:] = [str(self.root), *(path for path in here if path and Path(path).resolve() != ROOT)]
            code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", _FAST, *tests])
        finally:
            sys.stdout.flush()
            os._exit(code)

    def _touch(self, path: Path) -> None:
        """Python takes a compiled file for current when its source has the same second and size."""
        self._stamp += 2
        os.utime(path, (self._stamp, self._stamp))


def _exit_code(child: int, timeout_s: float) -> int:
    """Of a process that leads a session, once it has ended. Raises subprocess.TimeoutExpired, and it is gone then."""
    deadline = time.monotonic() + timeout_s
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            for process in [*psutil.Process(child).children(recursive=True), psutil.Process(child)]:
                with suppress(psutil.NoSuchProcess):  # ranks lead sessions of their own
                    process.kill()
            os.waitpid(child, 0)
            raise subprocess.TimeoutExpired("pytest", timeout_s)
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(ended[1])


def digest(mutant: Mutant, root: Path) -> str:
    """What its verdict depends on, apart from the remainder of the tree at `root`."""
    files = [f"megatron_opd/{mutant.file}", *(test.partition("::")[0] for test in mutant.tests)]
    texts = [(root / name).read_text() if (root / name).is_file() else "" for name in files]
    return hashlib.sha256(json.dumps([astuple(mutant), texts]).encode()).hexdigest()


def judge(tree: Tree, mutant: Mutant, timeout_s: float) -> tuple[str, str]:
    """(verdict, what to know about it)."""
    try:
        with tree.with_fault(mutant):
            code, said = tree.run(mutant.tests, timeout_s)
        wrong = tree.without_fault(mutant.tests, timeout_s) if code == 1 else ""
    except ValueError as error:
        return "stale", str(error)
    except subprocess.TimeoutExpired:
        return "hung", f"no end in {timeout_s:g} s"
    failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if code != 1:
        return _VERDICTS.get(code, "broken"), said.strip().splitlines()[-1]
    return ("broken", f"its tests fail without it too: {wrong}") if wrong else ("killed", (failed or [""])[0])


def _warm_up() -> None:
    """Import what is large and not ours: every run of tests is a fork of this process. One thread, as in `make test`,
    and so that there is none which a fork would lose."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("torch", "transformers", "aiohttp", "pydantic"):
        importlib.import_module(name)


def known() -> dict[str, Any]:
    """What was found before, by name; another run may be adding to it."""
    return json.loads(FOUND.read_text()) if FOUND.is_file() else {}


def main() -> int:
    """Run mutants, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of names; default: all mutants")
    parser.add_argument("--fresh", action="store_true", help="also run those whose verdict is known")
    parser.add_argument("--list", action="store_true", help="print names and tests, run nothing")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S", help="for the tests of one mutant")
    how = parser.parse_args()
    chosen = [m for m in read() if not how.words or any(word in m.name for word in how.words)]
    if how.list:
        print(*(f"{m.name:45} {' '.join(m.tests)}" for m in chosen), sep="\n")
        return 0
    counts: dict[str, int] = {}
    _warm_up()
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        tree = Tree(Path(directory))
        for mutant in chosen:
            key, begun = digest(mutant, tree.root), time.monotonic()
            found = known().get(mutant.name)
            if how.fresh or not found or found["digest"] != key or found["verdict"] != "killed":
                verdict, note = judge(tree, mutant, how.timeout)
                seconds = round(time.monotonic() - begun)
                found = {"digest": key, "verdict": verdict, "note": note, "seconds": seconds}
                FOUND.parent.mkdir(exist_ok=True)
                FOUND.write_text(json.dumps({**known(), mutant.name: found}, indent=1))
            counts[found["verdict"]] = counts.get(found["verdict"], 0) + 1
            print(f"{mutant.name:45} {found['verdict']:7} {found['seconds']:4d} s  {found['note']:.150}", flush=True)
    print(f"{len(chosen)} mutants:", ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    return int(counts.keys() != {"killed"})


if __name__ == "__main__":
    sys.exit(main())
