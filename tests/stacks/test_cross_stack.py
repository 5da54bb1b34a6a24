"""A run that begins on one stack and goes on on the other: `make test-newest` makes the environments of both.

A checkpoint of either loads in the other with the optimizer's state, and the run ends where a run on one stack ends, up
to rounding: each torch may have its own kernel for a CPU.
"""

import shutil
import subprocess

import pytest
import torch
from program import CONFIG, PATIENCE_S, ROOT, SMALL, environment, rows
from safetensors.torch import load_file

from megatron_opd.core import marker, stacks

pytestmark = pytest.mark.stacks

OLD, NEW = (ROOT / folder / "bin/python" for folder in (".venv", ".venv-newest"))
FOUR_STEPS = ["train.steps=4", "train.save_every=2", "optim.schedule=cosine"]
SETTINGS = {
    "TP2": ["parallel.tensor=2"],
    "DP2-bf16": ["parallel.data=2", "student.dtype=bf16"],
    "whole-optimizer": ["optim.distributed=false"],
    "LoRA": ["lora.rank=4"],
}


def train(python, run_dir, settings):
    """What a run of four steps says."""
    command = [python, "-m", "megatron_opd", "train", CONFIG, *SMALL, f"run.dir={run_dir}", *FOUR_STEPS, *settings]
    env = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return (run_dir / "train.log").read_text()


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=SETTINGS)
def whole(request, tmp_path_factory):
    """The settings, and a run by each stack from its beginning to its end."""
    runs = tmp_path_factory.mktemp("runs")
    for python, name in ((OLD, "old"), (NEW, "new")):
        train(python, runs / name, request.param)
    return request.param, runs


@pytest.mark.parametrize(("first", "second", "python"), [("old", "new", NEW), ("new", "old", OLD)])
def test_a_run_goes_on_on_the_other_stack(whole, first, second, python, tmp_path):
    settings, runs = whole
    run_dir = tmp_path / "run"
    shutil.copytree(runs / first, run_dir)
    shutil.rmtree(run_dir / "checkpoints/step_00000004")
    shutil.rmtree(run_dir / "hf")
    said = train(python, run_dir, settings)
    assert "resuming after step 2" in said
    before, after = (versions(runs / which)["megatron-core"] for which in (first, second))
    assert {before, after} == {stack.megatron[0] for stack in stacks.STACKS}
    assert f"changed since the checkpoint: megatron-core {before} -> {after}; last bits may differ" in said
    for mine, theirs in zip(rows(run_dir), rows(runs / second), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    theirs = load_file(runs / second / "hf/model.safetensors")
    for name, tensor in load_file(run_dir / "hf/model.safetensors").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


def versions(run_dir):
    """Versions that the last checkpoint says it was made by."""
    return marker.read(run_dir / "checkpoints/step_00000004")["conditions"]["versions"]
