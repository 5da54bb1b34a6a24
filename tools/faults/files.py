"""Damage to files between two starts: cut, flipped, emptied, removed, edited, written by somebody else."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from faults import judge
from faults.kind import Played, kind
from faults.stage import Stage, reference

Damage = Callable[[random.Random, Path], None]


def cut(rng: random.Random, file: Path) -> None:
    """Lose the end."""
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


def flip(rng: random.Random, file: Path) -> None:
    """Turn one bit round."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def empty(rng: random.Random, file: Path) -> None:
    """Lose all of it."""
    file.write_bytes(b"")


def remove(rng: random.Random, file: Path) -> None:
    """Lose the file."""
    file.unlink()


def zeros(rng: random.Random, file: Path) -> None:
    """Have a block of zeros, as after a power cut."""
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data))
    data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    file.write_bytes(data)


def grow(rng: random.Random, file: Path) -> None:
    """Have bytes behind the end."""
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randint(1, 100)))


DAMAGES: dict[str, Damage] = {f.__name__: f for f in (cut, flip, empty, remove, zeros, grow)}


def _damaged_newest(rng: random.Random, directory: Path, damage: str) -> Played:
    stage, whole = Stage(1, directory), reference(1)
    whole.before_export(stage)
    newest = sorted((stage.run_dir / "checkpoints").iterdir())[-1]
    file = rng.choice(sorted(path for path in newest.iterdir() if path.is_file()))
    before = file.read_bytes()
    DAMAGES[damage](rng, file)
    played = Played({"file": f"{newest.name}/{file.name}", "damage": damage})
    played.reached = not file.exists() or file.read_bytes() != before
    if played.reached:
        played.wrong = _refused_or_right(stage, newest.name) + judge.all_gone(stage)
    return played


def _refused_or_right(stage: Stage, name: str) -> list[str]:
    """The run refuses the checkpoint by its name and goes on from an older one when asked to, or is right at once."""
    how = stage.run()
    if how.code == 0:
        return judge.same_as(reference(stage.ranks), stage)
    wrong = judge.ended(how, codes=(1,)) + judge.one_message(how)
    wrong += [] if name in how.printed else [f"{name} is not named: {how.printed[-300:]}"]
    how = stage.run("train.resume_from=newest-valid")
    wrong += judge.ended(how, codes=(0,))
    if how.code == 0:
        _put_aside(stage)
        wrong += judge.same_as(reference(stage.ranks), stage)
    return wrong


def _put_aside(stage: Stage) -> None:
    """A damaged checkpoint is kept beside the others; it is no file that a whole run has."""
    for path in (stage.run_dir / "checkpoints").glob("*damaged*"):
        shutil.rmtree(path)


@kind
def checkpoint_file_cut(rng: random.Random, directory: Path) -> Played:
    """A file of the newest checkpoint is cut at a random place."""
    return _damaged_newest(rng, directory, "cut")


@kind
def checkpoint_bit_flipped(rng: random.Random, directory: Path) -> Played:
    """One bit in a file of the newest checkpoint is flipped."""
    return _damaged_newest(rng, directory, "flip")


@kind
def checkpoint_file_lost(rng: random.Random, directory: Path) -> Played:
    """A file of the newest checkpoint is empty, or gone."""
    return _damaged_newest(rng, directory, rng.choice(["empty", "remove"]))


@kind
def checkpoint_file_overwritten(rng: random.Random, directory: Path) -> Played:
    """A file of the newest checkpoint has a block of zeros, or bytes behind its end."""
    return _damaged_newest(rng, directory, rng.choice(["zeros", "grow"]))


@kind
def all_checkpoints_damaged(rng: random.Random, directory: Path) -> Played:
    """No checkpoint is whole: the run refuses with one message, however it is asked."""
    stage, whole = Stage(1, directory), reference(1)
    whole.before_export(stage)
    played, damaged = Played({"files": []}), sorted((stage.run_dir / "checkpoints").iterdir())
    for checkpoint in damaged:
        file = rng.choice(sorted(checkpoint.glob("*.distcp")))
        flip(rng, file)
        played.facts["files"].append(f"{checkpoint.name}/{file.name}")
    for overrides in ([], ["train.resume_from=newest-valid"]):
        how = stage.run(*overrides)
        played.wrong += judge.ended(how, codes=(1,)) + judge.one_message(how)
    left = sorted((stage.run_dir / "checkpoints").iterdir())
    if left != damaged:
        played.wrong.append(
            f"checkpoints were {[path.name for path in damaged]} and are {[path.name for path in left]}"
        )
    played.wrong += judge.all_gone(stage)
    return played


@kind
def marker_edited(rng: random.Random, directory: Path) -> Played:
    """loop.json is edited by hand: a key is lost, of another type, or has a value that cannot be."""
    stage, whole = Stage(1, directory), reference(1)
    whole.before_export(stage)
    newest = sorted((stage.run_dir / "checkpoints").iterdir())[-1]
    marker = json.loads((newest / "loop.json").read_text())
    key = rng.choice(sorted(marker))
    value = rng.choice([None, "x", -1, [], {}, 1e9, True, "", 99])
    played = Played({"key": key, "value": value})
    if value is None:
        del marker[key]
    else:
        played.reached = marker[key] != value
        marker[key] = value
    (newest / "loop.json").write_text(json.dumps(marker))
    if played.reached:
        played.wrong = _refused_or_right(stage, newest.name) + judge.all_gone(stage)
    return played


@kind
def log_damaged(rng: random.Random, directory: Path) -> Played:
    """metrics.jsonl or completions.jsonl is cut, has a garbage line, zeros or a flipped bit: never silently wrong."""
    stage, whole = Stage(1, directory), reference(1)
    whole.before_export(stage)
    shutil.rmtree(sorted((stage.run_dir / "checkpoints").iterdir())[-1])
    file = stage.run_dir / rng.choice(["metrics.jsonl", "completions.jsonl"])
    damage = rng.choice(["cut", "zeros", "grow", "empty", "remove"])
    DAMAGES[damage](rng, file)
    how = stage.run()
    played = Played({"file": file.name, "damage": damage})
    played.wrong = judge.ended(how, codes=(0, 1)) + judge.all_gone(stage)
    if how.code == 1:
        played.wrong += judge.one_message(how)
        played.wrong += [] if file.name in how.printed else [f"{file.name} is not named"]
    elif how.code == 0:
        played.wrong += _right_but_for_the_log(stage, file.name, how.printed)
    return played


def _right_but_for_the_log(stage: Stage, name: str, printed: str) -> list[str]:
    """The weights are right, and rows that are lost are said."""
    wrong = judge.same_as(reference(1), stage)
    lost = [line for line in wrong if line.startswith(name)]
    if lost and name not in printed:
        return wrong
    return [line for line in wrong if line not in lost]
