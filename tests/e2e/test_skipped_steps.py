"""A run whose teacher says NaN: steps are skipped, the log says where it came from, and the student stays as it was."""

import json
import shutil

import torch
from program import MODELS, assert_user_error, train
from safetensors.torch import load_file, save_file


def broken_teacher(directory):
    """A copy of a quickstart's teacher with one number of its last norm gone."""
    shutil.copytree(MODELS / "teacher_compare", directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return f"teachers.1.model={directory}"


def test_the_run_goes_on_and_the_weights_stay(tmp_path):
    broken = broken_teacher(tmp_path / "broken")
    done = train(tmp_path / "run", broken, "train.steps=2", "train.max_skipped=2")
    assert done.returncode == 0, done.stderr
    skipped = [
        line for line in done.stderr.splitlines() if "skipped, weights unchanged: the loss is nan at replica 0" in line
    ]
    assert ["step 1 " in line for line in skipped] == [True, False]
    assert all("what teacher 'compare' told" in line for line in skipped)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step/skipped"] for row in rows] == [1, 1]
    assert all(isinstance(value, float | int) for row in rows for value in row.values())  # no "nan"
    before, after = (load_file(p / "model.safetensors") for p in (MODELS / "student", tmp_path / "run/hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    stopped = train(tmp_path / "run", broken, "train.steps=4", "train.max_skipped=2")
    assert "resuming after step 2" in stopped.stderr
    assert_user_error(stopped, "the loss is nan", "train.max_skipped", "this is step 3 of the kind")
