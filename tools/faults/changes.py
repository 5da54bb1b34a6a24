"""Changes between two starts: of settings, data, models. Each is refused by its setting, or said."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import program

from faults import judge
from faults.files import flip
from faults.kind import Played, kind
from faults.stage import RUN, Stage, reference

_SETTINGS = [
    *("optim.lr=1e-5", "optim.lr=0.1", "train.steps=5", "train.steps=2", "run.seed=99", "train.micro_batch_size=4"),
    *("rollout.temperature=0.5", "loss.kind=forward_kl", "loss.ensemble=probs", "rollout.prompts_per_step=8"),
    *("optim.distributed=false", "lora.rank=4", "student.dtype=bf16", "train.save_every=2", "rollout.max_new_tokens=4"),
    *("parallel.tensor=2", "parallel.data=2", "parallel.pipeline=2", "train.pack=true", "optim.schedule=cosine"),
]


@kind
def settings_changed(rng: random.Random, directory: Path) -> Played:
    """A run goes on with other settings: they are refused, or the log says what changed."""
    stage = _half_done(directory)
    changed = rng.sample(_SETTINGS, rng.randint(1, 2))
    played = Played({"settings": changed})
    several = any(setting.startswith("parallel.") for setting in changed)
    if several:
        stage.ranks = 2
        changed = [setting for setting in changed if setting.startswith("parallel.")][:1]
        changed += [] if changed[0] == "parallel.tensor=2" else ["parallel.tensor=1"]
    how = stage.run(*changed)
    played.wrong = judge.ended(how, codes=(0, 1)) + judge.all_gone(stage)
    if how.code == 1:
        return _with(played, judge.one_message(how))
    said = [setting for setting in changed if f"{setting.partition('=')[0]}:" not in how.printed]
    said = [setting for setting in said if setting not in ("parallel.tensor=1", "train.steps=4")]
    return _with(played, [f"{setting} is not said to have changed" for setting in said])


@kind
def data_changed(rng: random.Random, directory: Path) -> Played:
    """A run goes on with other training data: rows reordered, cut, doubled, or edited."""
    rows = _rows(program.ROOT / "examples/quickstart/data/add.train.jsonl")[:40]
    stage = Stage(1, directory)
    file = directory / "data.jsonl"
    file.write_text("".join(rows))
    stage.settings = (*RUN, f"data.train=[{{name: add, path: {file}}}]")
    how = stage.run("train.steps=2")
    how_changed = rng.choice(["reordered", "cut", "doubled", "edited", "longer"])
    played = Played({"change": how_changed}, wrong=judge.ended(how, codes=(0,)))
    file.write_text("".join(_CHANGES[how_changed](rng, rows)))
    how = stage.run()
    played.wrong += judge.ended(how, codes=(1,)) + judge.all_gone(stage)
    if how.code == 1:
        played.wrong += judge.one_message(how) + ([] if "add" in how.printed else ["the source is not named"])
    return played


def _reordered(rng: random.Random, rows: list[str]) -> list[str]:
    first, second = rng.sample(range(len(rows)), 2)
    new = list(rows)
    new[first], new[second] = new[second], new[first]
    return new


def _edited(rng: random.Random, rows: list[str]) -> list[str]:
    at = rng.randrange(len(rows))
    row = json.loads(rows[at])
    key = next(name for name, value in row.items() if isinstance(value, str))
    row[key] = row[key][:-1] + rng.choice("0123456789x")
    return [*rows[:at], json.dumps(row) + "\n", *rows[at + 1 :]]


_CHANGES = {
    "reordered": _reordered,
    "cut": lambda rng, rows: rows[: rng.randrange(len(rows) // 2, len(rows))],
    "doubled": lambda rng, rows: [*rows, rng.choice(rows)],
    "edited": _edited,
    "longer": lambda rng, rows: [*rows, *rows],
}


@kind
def model_changed(rng: random.Random, directory: Path) -> Played:
    """A file of a model is cut, lost or flipped before the start: refused with one message, or the run is whole."""
    stage = Stage(1, directory)
    which = rng.choice(["student", "teacher_carry"])
    model = directory / which
    shutil.copytree(program.MODELS / which, model)
    file = rng.choice(sorted(path for path in model.iterdir() if path.is_file()))
    how_changed = rng.choice(["cut", "lost", "flipped", "emptied"])
    if how_changed == "lost":
        file.unlink()
    elif how_changed == "flipped":
        flip(rng, file)
    else:
        file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size) if how_changed == "cut" else 0])
    setting = f"student.model={model}" if which == "student" else f"teachers.0.model={model}"
    how = stage.run(setting)
    played = Played({"file": f"{which}/{file.name}", "change": how_changed})
    played.wrong = judge.ended(how, codes=(0, 1)) + judge.all_gone(stage)
    return _with(played, judge.one_message(how) if how.code == 1 else [])


def _half_done(directory: Path) -> Stage:
    """The run after three of four steps."""
    stage = Stage(1, directory)
    reference(1).before_export(stage)
    shutil.rmtree(sorted((stage.run_dir / "checkpoints").iterdir())[-1])
    return stage


def _rows(file: Path) -> list[str]:
    return [line + "\n" for line in file.read_text().splitlines()]


def _with(played: Played, more: list[str]) -> Played:
    played.wrong += more
    return played
