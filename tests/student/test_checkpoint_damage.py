"""Checkpoints of two ranks, damaged in every way: what is damaged is named, and what is whole is offered and taken."""

import contextlib
import io
import json
import os
import pickle
import random
import shutil

import pytest
import tiny
import torch

from megatron_opd.core import hashed_files, marker
from megatron_opd.core.run_dir import MARKER

STEPS = ("step_00000010", "step_00000020", "step_00000030")
NEWEST = STEPS[-1]
SMALL = ("common.pt", ".metadata", "metadata.json")
"""Files that all ranks read; the newest stack has an entry in place of the first."""


def student_of(parallel, model):
    from megatron_opd.student.student import Student

    return Student(tiny.config(model, [{"name": "t", "model": model}]), parallel)


def saved(parallel, model, run_dir):
    """Saves three checkpoints; returns what this rank synced and renamed meanwhile, in order."""
    from megatron_opd.student.checkpoint import Checkpoints

    student, happened = student_of(parallel, model), []
    with noted(happened):
        for step in (10, 20, 30):
            Checkpoints(run_dir, parallel, keep_last=3).save(student, {"step": step})
    return happened


@contextlib.contextmanager
def noted(happened):
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor):
        fsync(descriptor)
        happened.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def noting_replace(source, target, **how):
        rename(source, target, **how)
        happened.append(("rename", str(target)))

    replace = os.replace
    os.fsync, os.replace, os.rename = noting_fsync, noting_replace, noting_replace
    try:
        yield
    finally:
        os.fsync, os.replace, os.rename = fsync, replace, rename


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.save(tiny.build("qwen3"), tmp_path_factory.mktemp("model") / "hf"))


@pytest.fixture(scope="module")
def whole(ranks, model, tmp_path_factory):
    """(a run's directory with three checkpoints, what each rank synced and renamed)."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return run_dir, ranks.run(2, saved, model, str(run_dir), tensor=2)


def restored(parallel, model, runs, settings):
    """By directory of a run: the step that was restored, or the error; and the lines for the log."""
    from megatron_opd.student.checkpoint import CheckpointError, Checkpoints

    student, answers = student_of(parallel, model), {}
    for run in runs:
        said = []
        try:
            loop = Checkpoints(run, parallel, keep_last=3, say=said.append, **settings).restore(student)
            answers[run] = loop["step"], said
        except (CheckpointError, RuntimeError) as error:
            answers[run] = str(error).removeprefix("CheckpointError: "), said
    return answers


@pytest.fixture
def restore(ranks, model):
    """Restores from each directory on two ranks, which must agree; returns the answers."""

    def call(*runs, **settings):
        mine, theirs = ranks.run(2, restored, model, [*map(str, runs)], settings, tensor=2)
        assert mine == theirs
        return [mine[str(run)] for run in runs]

    return call


def test_all_is_on_disk_before_the_marker_has_its_name(whole):
    """Otherwise a power cut can leave a marker without what it vouches for."""
    run_dir, happened = whole
    for step in STEPS:
        checkpoint = run_dir / "checkpoints" / step
        files = [path for path in checkpoint.iterdir() if path.name != MARKER]
        assert len(files) >= 5
        named = happened[0].index(("rename", str(checkpoint / MARKER)))
        before, after = happened[0][:named], happened[0][named + 1 :]
        for path in (checkpoint, checkpoint.parent, run_dir, run_dir.parent, checkpoint / f".{MARKER}.tmp"):
            assert ("sync", str(path)) in before, path
        assert after[0] == ("sync", str(checkpoint))
        for path in files:
            assert any(("sync", str(path)) in (before if rank == 0 else theirs) for rank, theirs in enumerate(happened))


def test_the_marker_has_every_file(whole):
    for step in STEPS:
        checkpoint = whole[0] / "checkpoints" / step
        files = marker.read(checkpoint)["files"]
        assert set(files) == {path.name for path in checkpoint.iterdir()} - {MARKER}
        for name, file in files.items():
            assert file == hashed_files.measured(checkpoint / name)


def small_files(run):
    """Those of SMALL that a run's checkpoints have."""
    return [name for name in SMALL if (run / "checkpoints" / NEWEST / name).is_file()]


def cut(path, _):
    path.write_bytes(path.read_bytes()[:-1])


def grown(path, _):
    path.write_bytes(path.read_bytes() + b"\0")


def emptied(path, _):
    path.write_bytes(b"")


def removed(path, _):
    path.unlink()


def flipped(path, chance):
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def turned_round(path, _):
    path.write_bytes(path.read_bytes()[::-1])


def unreadable(path, _):
    path.unlink()
    path.mkdir()


DAMAGE = (cut, grown, emptied, removed, flipped, turned_round, unreadable)


def damaged_run(whole, to, *steps_damages_names, seed=0):
    run = shutil.copytree(whole, to)
    for step, damage, name in steps_damages_names:
        damage(run / "checkpoints" / step / name, random.Random(f"{seed} {step} {damage.__name__} {name}"))
    return run


def test_every_damage_to_every_file_is_named_with_the_checkpoint_that_is_whole(whole, restore, tmp_path):
    names = sorted(path.name for path in (whole[0] / "checkpoints" / NEWEST).iterdir())
    cases = [(damage, name) for damage in DAMAGE for name in names if (damage, name) not in _NO_MARKER]
    runs = [damaged_run(whole[0], tmp_path / f"{d.__name__} {name}", (NEWEST, d, name)) for d, name in cases]
    for run, (damage, name), (error, _) in zip(runs, cases, restore(*runs), strict=True):
        checkpoints = run / "checkpoints"
        assert str(error).startswith(f"the checkpoint {checkpoints / NEWEST} is damaged: "), (damage, name, error)
        assert name in error, (damage, error)
        assert f"{checkpoints / STEPS[1]} is whole: train.resume_from=newest-valid continues from it" in error
        assert "\n" not in error
        assert sorted(path.name for path in checkpoints.iterdir()) == [*STEPS]
    for run, (damage, name), (step, said) in zip(runs, cases, restore(*runs, skip_damaged=True), strict=True):
        assert step == 20, (damage, name)
        aside = f"{NEWEST}.damaged"
        assert sum("passed over" in line and name in line and aside in line for line in said) == 1
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [*STEPS[:2], aside]


_NO_MARKER = [(removed, MARKER), (unreadable, MARKER)]


def test_without_a_marker_it_is_no_checkpoint_and_the_log_says_so(whole, restore, tmp_path):
    runs = [damaged_run(whole[0], tmp_path / d.__name__, (NEWEST, d, MARKER)) for d, _ in _NO_MARKER]
    for run, (step, said) in zip(runs, restore(*runs), strict=True):
        assert step == 20
        assert said == [
            f"{run}/checkpoints/{NEWEST} has no loop.json: its save was cut short, and the next one removes it"
        ]


def test_several_damaged_ones(whole, restore, tmp_path):
    two = [(NEWEST, flipped, "__0_0.distcp"), (STEPS[1], cut, MARKER)]
    run = damaged_run(whole[0], tmp_path / "two", *two)
    small = small_files(whole[0])[0]
    all_three = damaged_run(whole[0], tmp_path / "three", *two, (STEPS[0], removed, small))
    (run / "checkpoints" / f"{NEWEST}.damaged").mkdir()  # of an earlier time
    (error, _), (none, _) = restore(run, all_three)
    assert f"{run}/checkpoints/{STEPS[0]} is whole" in error
    for skip in (False, True):
        ((none, _),) = restore(all_three, skip_damaged=skip)
        assert f"{NEWEST} is damaged: __0_0.distcp is not as it was written" in none
        assert f"no older one is whole ({STEPS[0]}: there is no {small} in it)" in none
    ((step, said),) = restore(run, skip_damaged=True)
    assert step == 10
    assert len(said) == 2
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == [STEPS[0], f"{STEPS[1]}.damaged", f"{NEWEST}.damaged", f"{NEWEST}.damaged2"]
    ((alone, _),) = restore(damaged_run(run, tmp_path / "one", (STEPS[0], emptied, ".metadata")))
    assert "is damaged: .metadata has 0 bytes" in alone
    assert "it is the only one" in alone


def test_who_cannot_wait_has_sizes_compared(whole, restore, tmp_path):
    short, other = (
        damaged_run(whole[0], tmp_path / d.__name__, (NEWEST, d, "__1_1.distcp")) for d in (cut, turned_round)
    )
    (whole_step, said), (error, _) = restore(whole[0], short, verify=False)
    assert (whole_step, said) == (30, [])
    assert "__1_1.distcp has" in error
    turned_round(other / "checkpoints" / NEWEST / "metadata.json", None)
    ((error, _),) = restore(other)
    assert "(and 1 more)" in error


def test_files_that_no_save_wrote_are_named_and_not_read(whole, restore, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    (run / "checkpoints" / NEWEST / "__9_0.distcp").write_bytes(b"from elsewhere")
    (run / "checkpoints" / NEWEST / "notes").mkdir()
    ((step, said),) = restore(run)
    assert step == 30
    assert said == [
        f"{run}/checkpoints/{NEWEST} holds __9_0.distcp, notes, which no save wrote there and nothing reads"
    ]


def without_hashes(checkpoint):
    """As older versions saved it."""
    loop = marker.read(checkpoint)
    del loop["files"]
    (checkpoint / MARKER).write_text(marker.text(loop))


def test_files_that_no_save_records_are_damage(whole, restore, tmp_path):
    """Somebody has taken the checksum out."""
    run = shutil.copytree(whole[0], tmp_path / "run")
    checkpoint = run / "checkpoints" / NEWEST
    loop = marker.read(checkpoint)
    loop["files"]["metadata.json"] = "as before"
    (checkpoint / MARKER).write_text(json.dumps(loop))
    ((error, _),) = restore(run)
    assert f"{checkpoint} is damaged: loop.json: files is not what a save writes" in error


def test_checkpoints_of_older_versions_load_with_a_line(whole, restore, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    for step in STEPS:
        without_hashes(run / "checkpoints" / step)
    cases = [(damage, name) for damage in (cut, emptied, removed) for name in small_files(run)]
    cases += [(damage, "__1_0.distcp") for damage in (cut, emptied, removed)]
    runs = [damaged_run(run, tmp_path / f"{d.__name__} {name}", (NEWEST, d, name)) for d, name in cases]
    (step, said), *errors = restore(run, *runs)
    assert step == 30
    (line,) = said
    assert line.startswith(f"{run}/checkpoints/{NEWEST} was saved without hashes, by an older version")
    for (_, name), (error, _) in zip(cases, errors, strict=True):
        assert name in str(error)
        assert f"{STEPS[1]} is whole" in error


def saved_without_hashes(parallel, model, run_dir):
    from megatron_opd.student.checkpoint import Checkpoints

    Checkpoints(run_dir, parallel, keep_last=1, verify=False).save(student_of(parallel, model), {"step": 10})


def test_who_cannot_wait_has_no_hashes_recorded(ranks, model, restore, tmp_path):
    ranks.run(2, saved_without_hashes, model, str(tmp_path / "run"), tensor=2)
    files = marker.read(tmp_path / "run/checkpoints" / STEPS[0])["files"]
    assert {file["blake2b"] for file in files.values()} == {None}
    damaged = damaged_run(tmp_path / "run", tmp_path / "damaged", (STEPS[0], cut, "__0_1.distcp"))
    (step, (line,)), (error, _) = restore(tmp_path / "run", damaged)
    assert step == 10
    assert line.endswith("was saved without hashes (train.verify_checkpoints): only sizes could be compared")
    assert "is damaged: __0_1.distcp has" in error


class Touches:
    """Unpickled, it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hostile_metadata(checkpoint, trace):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Touches(trace)))


def hostile_common(checkpoint, trace):
    torch.save({"scheduler": Touches(trace)}, checkpoint / "common.pt")


def hostile_common_entry(checkpoint, trace):
    """Where what all ranks share is an entry; else the file again."""
    if (checkpoint / "common.pt").is_file():
        hostile_common(checkpoint, trace)
    else:
        entry(checkpoint, "common_state", stored([{"scheduler": Touches(trace)}]))


def entry(checkpoint, part, content):
    """Put `content` in place of the first entry whose name has `part`."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    _, info = next((index, info) for index, info in metadata.storage_data.items() if part in index.fqn)
    with (checkpoint / info.relative_path).open("ab") as file:
        info.offset, info.length = file.tell(), file.write(content)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def stored(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def hostile_random_state(checkpoint, trace):
    entry(checkpoint, "random/", stored({"cpu": Touches(trace)}))


def hostile_extra_state(checkpoint, trace):
    entry(checkpoint, "_extra_state", stored(Touches(trace)))


def hostile_fp8_state(checkpoint, trace):
    inside = bytearray(pickle.dumps({"recipe": Touches(trace)}))
    entry(checkpoint, "_extra_state", stored(torch.frombuffer(inside, dtype=torch.uint8)))


def hostile_weight(checkpoint, trace):
    entry(checkpoint, "embedding.word_embeddings.weight", stored(Touches(trace)))


def test_a_hostile_checkpoint_runs_nothing(whole, restore, tmp_path):
    """Its maker has put right hashes into the marker, or none."""
    kinds = (
        hostile_metadata,
        hostile_common,
        hostile_common_entry,
        hostile_random_state,
        hostile_extra_state,
        hostile_fp8_state,
        hostile_weight,
    )
    runs, trace = [], tmp_path / "trace"
    for make in kinds:
        run = shutil.copytree(whole[0], tmp_path / make.__name__)
        runs.append(run)
        for step in STEPS:
            make(run / "checkpoints" / step, trace)
            without_hashes(run / "checkpoints" / step)
    for make, (error, _) in zip(kinds, restore(*runs), strict=True):
        assert not trace.exists()
        assert "do not trust it" in str(error), (make, error)
        assert "\n" not in error
