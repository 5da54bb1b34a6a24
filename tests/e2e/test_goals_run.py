"""Runs that end when it is enough, and keep the weights that were best."""

import json

import program
import pytest
import torch
from safetensors.torch import load_file

from megatron_opd.tracking.tracker import read_metrics

GOALS = ["train.steps=4", "train.eval_every=2", "train.save_best=eval/kl/ensemble"]


@pytest.mark.slow
def test_a_run_ends_when_it_is_enough_and_goes_on_without_the_condition(tmp_path):
    enough = "train.stop_when=[loss < 100, eval/kl/ensemble stalls 9]"
    first = program.train(tmp_path, *GOALS, enough)
    assert first.returncode == 0, first.stderr
    log = (tmp_path / "train.log").read_text()
    assert "the run ends after 1 of 4 steps: train.stop_when: loss < 100 (it is " in log
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/kl/ensemble" in row] == [0, 1]
    assert (tmp_path / "checkpoints/step_00000001/loop.json").exists()
    assert _is_best(tmp_path)

    again = program.train(tmp_path, *GOALS, enough)
    assert again.returncode == 0, again.stderr
    assert read_metrics(tmp_path / "metrics.jsonl") == rows

    on = program.train(tmp_path, *GOALS, "train.stop_when=[]")
    assert on.returncode == 0, on.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]
    assert _is_best(tmp_path)


def _is_best(run_dir):
    """Whether best.json says what the metrics say, and best/ has those weights."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    values = {int(row["step"]): row["eval/kl/ensemble"] for row in rows if "eval/kl/ensemble" in row}
    step = min(values, key=values.get)
    said = json.loads((run_dir / "best.json").read_text())
    assert said == {"metric": "eval/kl/ensemble", "value": values[step], "step": step}
    best, last = [load_file(run_dir / name / "model.safetensors") for name in ("best", "hf")]
    same = all(torch.equal(best[name], last[name]) for name in last)
    return same == (step == max(values))
