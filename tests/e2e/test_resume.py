"""Runs that are cut off, at any time, and started again: they end where an uninterrupted run ends."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from program import MODELS, assert_user_error, checkpoints, exported, rows, started, train
from safetensors.torch import load_file

from megatron_opd.core import hashed_files, marker
from megatron_opd.loss.fused import native

FOUR_RANKS = ["parallel.tensor=2", "parallel.pipeline=2"]
SIX_STEPS = [
    *("train.steps=6", "train.save_every=3", "train.eval_every=3", "optim.schedule=cosine"),
    f"data.eval=[{{name: add, path: {Path(__file__).with_name('few.jsonl')}}}]",
]
TWO_STEPS = ["train.steps=2", "train.save_every=1"]

# Put first on PYTHONPATH: kills the process when it is about to have a chosen file on disk.
KILL_AT_FSYNC = """
import os, signal
fsync = os.fsync

def killing(fd):
    if os.readlink(f"/proc/self/fd/{fd}").endswith(os.environ["KILL_AT_FSYNC"]) and "RANK" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(fd)

os.fsync = killing
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six steps on four ranks without an interruption."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    done = train(run_dir, *FOUR_RANKS, *SIX_STEPS)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Two steps on one rank, done, with a checkpoint after each."""
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    done = train(run_dir, *TWO_STEPS)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture
def copy_of(tmp_path):
    def copy(run_dir, without=()):
        to = tmp_path / "copy"
        shutil.copytree(run_dir, to)
        for name in without:
            shutil.rmtree(to / name)
        return to

    return copy


def test_killed_run_ends_bitwise_where_an_uninterrupted_one_ends(whole, tmp_path):
    with started(tmp_path, *FOUR_RANKS, *SIX_STEPS) as run:
        run.wait_for_step(4)
        run.kill_everyone()
    assert not (tmp_path / "hf").exists()
    done = train(tmp_path, *FOUR_RANKS, *SIX_STEPS)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 3" in done.stderr
    assert rows(tmp_path) == rows(whole)
    assert exported(tmp_path) == exported(whole)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("parallel.tensor=1", id="TP1"),
        pytest.param("parallel.data=2", id="DP2", marks=pytest.mark.slow),
        pytest.param("parallel.pipeline=2", id="PP2", marks=pytest.mark.slow),
    ],
)
def test_another_layout_continues_to_the_same_numbers(whole, copy_of, layout):
    run_dir = copy_of(whole, without=["checkpoints/step_00000006"])
    done = train(run_dir, *SIX_STEPS, layout)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 3" in done.stderr
    assert "changed since the last start: parallel.tensor: 2 -> 1" in done.stderr
    for mine, theirs in zip(rows(run_dir), rows(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    theirs = load_file(whole / "hf/model.safetensors")
    for name, tensor in load_file(run_dir / "hf/model.safetensors").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


def test_killed_in_the_middle_of_a_save(two_steps, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(KILL_AT_FSYNC)
    run_dir = tmp_path / "run"
    for kill_at, resumed in [("__0_1.distcp", None), (".loop.json.tmp", "resuming after step 1")]:
        env = {"PYTHONPATH": str(tmp_path / "site"), "KILL_AT_FSYNC": f"step_00000002/{kill_at}"}
        done = train(run_dir, *TWO_STEPS, launched=True, env=env)
        assert done.returncode == 1, done.stderr
        assert "rank 0 was ended by SIGKILL" in done.stderr
        assert "resuming" not in done.stderr if resumed is None else resumed in done.stderr
        assert checkpoints(run_dir) == ["step_00000001"]
        assert (run_dir / "checkpoints/step_00000002").is_dir()  # half of it
    assert (run_dir / "checkpoints/step_00000002/.loop.json.tmp").is_file()
    junk = run_dir / "checkpoints/step_00000099"  # half of one that no save will come back to
    junk.mkdir()
    done = train(run_dir, *TWO_STEPS)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 1" in done.stderr
    assert checkpoints(run_dir) == ["step_00000001", "step_00000002"]
    assert not junk.exists()
    assert rows(run_dir) == rows(two_steps)
    assert exported(run_dir) == exported(two_steps)


def test_finished_run_again_changes_nothing(two_steps, copy_of):
    run_dir = copy_of(two_steps)
    removed = run_dir / "checkpoints/step_00000000"  # all but its marker is there: the last removal was cut short
    shutil.copytree(run_dir / "checkpoints/step_00000001", removed, ignore=shutil.ignore_patterns("loop.json"))
    done = train(run_dir, *TWO_STEPS)
    assert done.returncode == 0, done.stderr
    assert "nothing to train" in done.stderr
    assert "changed since the last start: train" not in done.stderr
    assert "changed since the checkpoint" not in (run_dir / "train.log").read_text()
    assert (run_dir / "metrics.jsonl").read_bytes() == (two_steps / "metrics.jsonl").read_bytes()
    assert checkpoints(run_dir) == checkpoints(two_steps)
    assert not removed.exists()
    assert exported(run_dir) == exported(two_steps)


@pytest.mark.slow
def test_more_steps_continue_a_finished_run(two_steps, copy_of, tmp_path):
    run_dir = copy_of(two_steps)
    done = train(run_dir, *TWO_STEPS, "train.steps=5")
    assert done.returncode == 0, done.stderr
    assert "resuming after step 2" in done.stderr
    assert "changed since the last start: train.steps: 2 -> 5" in (run_dir / "train.log").read_text()
    assert checkpoints(run_dir) == ["step_00000004", "step_00000005"]  # keep_last
    at_once = train(tmp_path / "once", *TWO_STEPS, "train.steps=5")
    assert at_once.returncode == 0, at_once.stderr
    assert rows(run_dir) == rows(tmp_path / "once")
    assert exported(run_dir) == exported(tmp_path / "once")


def test_without_a_checkpoint_the_run_starts_from_the_beginning(two_steps, copy_of):
    run_dir = copy_of(two_steps, without=["checkpoints", "hf"])
    done = train(run_dir, *TWO_STEPS)
    assert done.returncode == 0, done.stderr
    assert f"no complete checkpoint in {run_dir}: starting from the beginning" in done.stderr
    assert rows(run_dir) == rows(two_steps)
    assert exported(run_dir) == exported(two_steps)


def other_student(run_dir):
    return f"student.model={MODELS / 'teacher_carry'}", "hidden_size is 64", "student.model"


def other_optimizer(run_dir):
    return "optim.distributed=false", "set optim.distributed back"


def damaged_data(run_dir):
    (run_dir / "checkpoints/step_00000002/__0_0.distcp").write_bytes(b"")
    whole = run_dir / "checkpoints/step_00000001"
    return (
        "run.seed=1234",
        "is damaged: __0_0.distcp has 0 bytes",
        f"{whole} is whole",
        "train.resume_from=newest-valid",
    )


def damaged_marker(run_dir):
    (run_dir / "checkpoints/step_00000002/loop.json").write_text(json.dumps([]))
    return "run.seed=1234", "is damaged: loop.json"


def hostile(run_dir):
    """A directory of somebody who wants to run code here, with a marker as it should be."""
    for step in ("step_00000001", "step_00000002"):
        checkpoint = run_dir / "checkpoints" / step
        (checkpoint / ".metadata").write_bytes(pickle.dumps(Touches(run_dir / "trace")))
        loop = marker.read(checkpoint)
        loop["files"][".metadata"] = hashed_files.measured(checkpoint / ".metadata")
        (checkpoint / "loop.json").write_text(marker.text(loop))
    return "train.resume_from=newest-valid", "asks for posix.mkdir, which no checkpoint needs"


class Touches:
    """Unpickled, it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def other_step(run_dir):
    marker = run_dir / "checkpoints/step_00000002/loop.json"
    marker.write_text(marker.read_text().replace('"step": 2', '"step": 99'))
    return "run.seed=1234", "is damaged", "loop.json: step is 99, but the directory is step_00000002"


def edited_rows(run_dir):
    """A copy of the first source, one row less, under the source's name."""
    rows = (MODELS.parent / "data/add.train.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "add.jsonl").write_text("".join([*rows[:7], *rows[8:]]))
    told = f"rows {len(rows)} -> {len(rows) - 1}, the first that differs is in 7 to 8"
    return f"data.train.0.path={run_dir / 'add.jsonl'}", "source 'add' has changed", told, "data.on_change: accept"


@pytest.mark.parametrize(
    "make_wrong",
    [
        other_student,
        other_optimizer,
        damaged_data,
        hostile,
        edited_rows,
        pytest.param(other_step, marks=pytest.mark.slow),
        pytest.param(damaged_marker, marks=pytest.mark.slow),
    ],
)
def test_checkpoint_that_does_not_belong_or_is_damaged(two_steps, copy_of, make_wrong):
    run_dir = copy_of(two_steps)
    override, *fragments = make_wrong(run_dir)
    done = train(run_dir, *TWO_STEPS, override)
    assert_user_error(done, "step_00000002", *fragments)
    assert checkpoints(run_dir) == checkpoints(two_steps)
    assert rows(run_dir) == rows(two_steps)
    assert not (run_dir / "trace").exists()


def test_a_damaged_checkpoint_is_passed_over_on_demand(two_steps, copy_of):
    """One bit of a weight is enough. The run ends as if it had never saved there, and keeps the damaged files."""
    run_dir = copy_of(two_steps, without=["hf"])
    file = run_dir / "checkpoints/step_00000002/__0_1.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)
    with (run_dir / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b"\0\0 garbage \xff\n" + b'{"step": 2, "lo')
    done = train(run_dir, *TWO_STEPS, "train.resume_from=newest-valid")
    assert done.returncode == 0, done.stderr
    said = (run_dir / "train.log").read_text()
    assert f"passed over {file.parent}, which is damaged: __0_1.distcp is not as it was written" in said
    assert "kept as step_00000002.damaged" in said
    assert "metrics.jsonl: moved what is no row to metrics.jsonl.damaged: line 3" in said
    assert "resuming after step 1" in said
    assert (run_dir / "checkpoints/step_00000002.damaged/__0_1.distcp").read_bytes() == data
    assert checkpoints(run_dir) == ["step_00000001", "step_00000002", "step_00000002.damaged"]
    assert rows(run_dir) == rows(two_steps)
    assert exported(run_dir) == exported(two_steps)


@pytest.mark.skipif(native.library() is None, reason="there is no C++ compiler here")
def test_other_prompts_and_another_backend_are_accepted_and_said(two_steps, copy_of):
    """And kept with the next checkpoint, so that they are said once."""
    run_dir = copy_of(two_steps)
    changed = [edited_rows(run_dir)[0], "data.on_change=accept", *TWO_STEPS, "train.steps=3"]
    no_kernels = {"CXX": "no-such-compiler", "MEGATRON_OPD_CACHE": str(run_dir / "cache")}
    said = [
        "changed since the checkpoint: data.train: source 'add' has changed: rows",
        "changed since the checkpoint: loss backend native -> torch; last bits may differ",
        "warning: the loss runs on the backend torch: the native kernels are not there: there is no C++ compiler",
    ]
    done = train(run_dir, *changed, env=no_kernels)
    assert done.returncode == 0, done.stderr
    for line in said:
        assert line in (run_dir / "train.log").read_text()
    log = (run_dir / "train.log").read_text()
    done = train(run_dir, *changed[:1], *TWO_STEPS, "train.steps=3", env=no_kernels)
    assert done.returncode == 0, done.stderr
    assert "changed since the checkpoint" not in (run_dir / "train.log").read_text().removeprefix(log)
