#!/usr/bin/env python3
"""Run what the ordinary user of a Dockerfile runs, in an empty folder: for machines on which no image can be built.

    python tools/image_steps.py docker/Dockerfile.cpu             # COPY, RUN and then CMD, behind the first USER
    python tools/image_steps.py docker/Dockerfile.cpu --list      # what would run
    python tools/image_steps.py docker/Dockerfile.cpu --build-arg TORCH=torch==2.13.0 --no-command

Steps before USER are root's (system packages, users); they are printed and left out, so this machine must have what
they install. COPY copies what git does not ignore. Files of one stage, without absolute paths in RUN, can be run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_STEP_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile."""

    name: str
    """In capitals, as RUN."""
    options: tuple[str, ...]
    """Its options, as --from=trainer."""
    value: str
    """The rest, on one line."""
    line: int


def parse(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile. Raises ValueError for a line that is none, and for here-documents."""
    found, pending, begun = [], "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#") or not line.strip():
            continue
        begun = begun or number
        pending += line.strip()
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        found.append(_instruction(pending, begun))
        pending, begun = "", 0
    if pending:
        raise ValueError(f"line {begun}: the instruction goes on behind the end of the file")
    return found


def _instruction(text: str, line: int) -> Instruction:
    match = re.fullmatch(r"([A-Za-z]+)((?:\s+--[\w-]+=\S+)*)\s+(.+)", text)
    if not match or "<<" in text:
        raise ValueError(f"line {line}: {text!r} is no instruction that is understood here")
    return Instruction(match[1].upper(), tuple(match[2].split()), match[3].strip(), line)


@dataclass
class _State:
    """Where a build is: its folder in place of the image's root, working directory, environment and shell."""

    image: Path
    cwd: Path
    env: dict[str, str]
    given: dict[str, str]
    """Arguments of the command line."""
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    is_user: bool = False


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--list", action="store_true", help="print the steps, run nothing")
    parser.add_argument("--build-arg", nargs="+", default=[], metavar="NAME=VALUE")
    parser.add_argument("--no-command", action="store_true", help="leave CMD out")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="an empty folder to run in, which stays")
    arguments = parser.parse_args(argv)
    steps = parse(arguments.dockerfile.read_text())
    if arguments.list:
        print("\n".join(f"{step.line}: {step.name} {step.value}" for step in steps))
        return 0
    given = dict(pair.split("=", 1) for pair in arguments.build_arg)
    with tempfile.TemporaryDirectory(prefix="image_steps_") as folder:
        image = arguments.keep or Path(folder)
        image.mkdir(parents=True, exist_ok=True)
        return build(steps, image.resolve(), given=given, has_command=not arguments.no_command)


def build(steps: list[Instruction], image: Path, *, given: dict[str, str], has_command: bool) -> int:
    """Run the user's steps; the exit code of the first that fails, else 0."""
    env = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS")}
    state = _State(image, image, env, given)
    for step in steps:
        if step.name == "CMD" and not has_command:
            continue
        started = time.monotonic()
        code = _take(step, state)
        if code is not None:
            print(f"line {step.line}: exit code {code} after {time.monotonic() - started:.0f} s", flush=True)
        if code:
            return code
    return 0


def _take(step: Instruction, state: _State) -> int | None:
    """Do one step; the exit code of what ran, if anything did."""
    if step.name == "SHELL":
        state.shell = json.loads(step.value)
    elif step.name == "ARG":
        name, _, default = step.value.partition("=")
        state.env[name] = state.given.get(name, default)
    elif step.name == "ENV":
        state.env |= dict(re.findall(r"(\w+)=(\S+)", step.value))
    elif step.name == "USER":
        state.is_user = step.value not in ("root", "0")
    elif step.name == "WORKDIR":
        state.cwd = state.image / step.value.lstrip("/")
        state.cwd.mkdir(parents=True, exist_ok=True)
    elif step.name == "COPY" and state.is_user:
        _copy(step.value.split(), state.cwd)
    elif step.name == "RUN":
        return _run([*state.shell, step.value], state)
    elif step.name == "CMD":
        return _run(json.loads(step.value), state)
    return None


def _run(command: list[str], state: _State) -> int | None:
    if not state.is_user:
        print(f"left out, since root does it: {command[-1]}", flush=True)
        return None
    print(f"run: {' '.join(command)}", flush=True)
    return subprocess.run(command, cwd=state.cwd, env=state.env, timeout=_STEP_TIMEOUT_S).returncode


def _copy(words: list[str], into: Path) -> None:
    """COPY SOURCE… TARGET: files, or folders with what is in them; a target with a / behind it is a folder."""
    *sources, target = words
    is_folder = target.endswith("/") or len(sources) > 1
    for name in tracked():
        for source in sources:
            inside = (Path(name).name if is_folder else "") if source == name else _below(name, source)
            if inside is None:
                continue
            to = into / target / inside
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to)


def _below(name: str, folder: str) -> str | None:
    """The path of a file below a folder; None where it is elsewhere."""
    if folder in (".", "./"):
        return name
    prefix = folder.rstrip("/") + "/"
    return name[len(prefix) :] if name.startswith(prefix) else None


def tracked() -> list[str]:
    """Paths of the files that are there and that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


if __name__ == "__main__":
    sys.exit(main())
