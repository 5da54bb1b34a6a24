"""The rules by which every injection is judged. Each returns what is wrong, as lines; none means that all is right."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from pathlib import Path

import program
import psutil

from faults.stage import Ended, Reference, Stage

_GONE_S = 120.0
_SETTLED_S = 10.0
_NOISE = re.compile(r"Traceback|^\S*(Error|Exception|Warning)\b|terminate called|core dumped", re.MULTILINE)
_GOES_ON = re.compile(r"  |rank \d+ |where ranks were when the run did not get on: ")
"""Lines of a list, and what a launcher adds to what a rank has said."""
_SHARED_MEMORY = Path("/dev/shm")
_NOT_COMPARED = {"train.log", "config.yaml", ".lock"}


def ended(how: Ended, *, codes: tuple[int, ...]) -> list[str]:
    """It ended by itself, with one of these exit codes."""
    if how.code is None:
        return [f"hung: killed after {how.seconds:.0f} s; it had printed: {_tail(how.printed)}"]
    return [] if how.code in codes else [f"exit code {how.code} instead of {codes}: {_tail(how.printed)}"]


def one_message(how: Ended) -> list[str]:
    """One error, told last, in words for people; it may go on for some lines."""
    wrong = []
    lines = [line for line in how.printed.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if "error: " in line]
    if len(errors) != 1:
        wrong.append(f"{len(errors)} messages instead of one: {[lines[i] for i in errors] or _tail(how.printed)}")
    elif not all(_GOES_ON.match(line) for line in lines[errors[0] + 1 :]):
        wrong.append(f"the message is not last; behind it: {_tail(how.printed)}")
    if noise := _NOISE.search(how.printed):
        wrong.append(f"a message for developers, {noise.group()!r}: {_tail(how.printed)}")
    return wrong


def all_gone(stage: Stage) -> list[str]:
    """No process, temporary file or shared memory is left."""
    until = time.monotonic() + _GONE_S
    while (left := stage.processes()) and time.monotonic() < until:
        time.sleep(0.05)
    wrong = [f"left running: {_described(process)}" for process in left]
    for process in left:
        process.kill()
    files = sorted(str(path.relative_to(stage.tmp)) for path in stage.tmp.rglob("*"))
    if files:
        wrong.append(f"left in TMPDIR: {files[:5]}")
    return wrong + [f"left in {_SHARED_MEMORY}: {name}" for name in _shared_memory_of(stage)]


def same_as(reference: Reference, stage: Stage) -> list[str]:
    """The run's numbers, answers, weights and files are bitwise those of a run that nothing happened to."""
    wrong, mine, theirs = [], stage.run_dir, reference.run_dir
    if program.rows(mine) != program.rows(theirs):
        steps = [[row["step"] for row in program.rows(run)] for run in (mine, theirs)]
        wrong.append(f"metrics.jsonl differs; steps {steps[0]}, expected {steps[1]}")
    for name in ("hf/model.safetensors", "completions.jsonl"):
        if (mine / name).read_bytes() != (theirs / name).read_bytes():
            wrong.append(f"{name} differs")
    more = _files(mine) ^ _files(theirs)
    return wrong + ([f"files differ: {sorted(more)[:5]}"] if more else [])


def continues(stage: Stage, reference: Reference, *overrides: str) -> list[str]:
    """The same command goes on, and ends bitwise where an undisturbed run ends."""
    how = stage.run(*overrides)
    wrong = ended(how, codes=(0,))
    return [f"continued: {line}" for line in wrong or same_as(reference, stage) + all_gone(stage)]


def _files(run_dir: Path) -> set[str]:
    names = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    kept_aside = ("logs/", "metrics.jsonl.damaged", "completions.jsonl.damaged")
    return {name for name in names if name not in _NOT_COMPARED and not name.startswith(kept_aside)}


def _shared_memory_of(stage: Stage) -> list[str]:
    """Files in shared memory that are newer than the stage and stay, though no living process maps or has them open.
    Those of SGLang servers are other programs'; so is a name that other programs have for a moment, as Python does."""
    until = time.monotonic() + _SETTLED_S
    while (left := _unused_shared_memory(stage.tmp.stat().st_ctime)) and time.monotonic() < until:
        time.sleep(0.5)
    return left


def _unused_shared_memory(since: float) -> list[str]:
    found = [path for path in _SHARED_MEMORY.iterdir() if path.is_file() and not path.name.startswith("sglang_")]
    new = set()
    for path in found:
        with suppress(FileNotFoundError):
            new |= {str(path)} if path.stat().st_mtime >= since else set()
    for process in psutil.process_iter() if new else ():
        with suppress(psutil.Error):
            new -= {entry.path for entry in process.memory_maps()} | {entry.path for entry in process.open_files()}
    return sorted(new)


def _described(process: psutil.Process) -> str:
    try:
        return (
            f"{process.pid} {process.status()} rank {process.environ().get('RANK')} {' '.join(process.cmdline()[:5])}"
        )
    except psutil.Error:
        return str(process.pid)


def _tail(text: str) -> str:
    return " | ".join(line for line in text.splitlines()[-6:] if line.strip())[-600:]
