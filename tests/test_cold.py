"""Every command once in a fresh interpreter, as a shell starts it. Other tests fork their programs (`warm.py`)."""

import functools
import tempfile

import program
import pytest
from program import CONFIG, assert_user_error, exported, rows, train

opd = functools.partial(program.opd, cold=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run of one step."""
    run_dir = tmp_path_factory.mktemp("cold") / "run"
    done = train(run_dir, "train.steps=1", cold=True)
    assert done.returncode == 0, done.stderr
    return run_dir


def test_train_launches_two_ranks(trained, tmp_path):
    done = train(tmp_path / "two", "train.steps=1", "parallel.tensor=2", cold=True)
    assert done.returncode == 0, done.stderr
    assert exported(tmp_path / "two")
    (found,), (expected,) = rows(tmp_path / "two"), rows(trained)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_report(trained):
    done = opd("report", trained)
    assert done.returncode == 0, done.stderr
    assert "Distance from student to teacher" in done.stdout


def test_eval(trained):
    done = opd("eval", CONFIG, f"run.dir={trained}")
    assert done.returncode == 0, done.stderr
    assert "add" in done.stdout


def test_eval_of_a_checkpoint(trained, tmp_path, monkeypatch):
    """The same numbers as the export of the same weights, and nothing is left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    checkpoint = trained / "checkpoints/step_00000001"
    ours, theirs = [
        program.here("eval", CONFIG, f"run.dir={trained}", *model) for model in (["--model", checkpoint], [])
    ]
    assert (ours.returncode, theirs.returncode) == (0, 0), ours.stderr
    assert f"intervals, {checkpoint}" in ours.stdout
    assert ours.stdout.splitlines()[1:] == theirs.stdout.splitlines()[1:]
    assert list(tmp_path.iterdir()) == []


def test_check(tmp_path):
    done = opd("check", CONFIG)
    assert done.returncode == 0, done.stderr
    assert "trainer: 4 ranks of `python -m megatron_opd train examples/quickstart.yaml`" in done.stdout
    assert_user_error(opd("check", CONFIG, "train.stepss=1"), "did you mean train.steps?")


def test_launch():
    done = opd("launch", CONFIG, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("trainer: 4 ranks")


def test_serve():
    assert_user_error(opd("serve", CONFIG), "this config starts no servers")
