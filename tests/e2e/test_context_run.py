"""A run whose sequences are split over two ranks: the same rows and the same student as on one, up to rounding."""

import pytest
import torch
from program import exported, here, rows, train
from safetensors.torch import load_file

STEPS = ["train.steps=3", "train.save_every=3", "train.eval_every=3", "log.completions_every=1"]
STEPS += ["optim.eps=1e-4"]  # Adam's first steps are signs of gradients otherwise, of those that are only rounding too


@pytest.mark.slow
def test_two_ranks_of_parts_are_one_rank_of_whole_sequences(tmp_path):
    for name, layout in (("whole", []), ("parts", ["parallel.context=2"])):
        done = train(tmp_path / name, *STEPS, *layout)
        assert done.returncode == 0, done.stderr
    for mine, theirs in zip(rows(tmp_path / "parts"), rows(tmp_path / "whole"), strict=True):
        # Rows are as long as parts of equal length need.
        assert mine.pop("batch/padding", 0) >= theirs.pop("batch/padding", 0)
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert exported(tmp_path / "parts")
    theirs = load_file(tmp_path / "whole/hf/model.safetensors")
    for name, tensor in load_file(tmp_path / "parts/hf/model.safetensors").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)
    said = here("check", "examples/quickstart.yaml", "parallel.context=2", "parallel.tensor=1", "parallel.pipeline=1")
    assert "trainer: 2 ranks" in said.stdout
