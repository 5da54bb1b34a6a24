"""A whole run in fp16: it learns, its loss scale is in metrics and checkpoints, and it can be cut anywhere."""

import shutil

import pytest
import torch
from program import exported, rows, train
from safetensors.torch import load_file

FP16 = ["student.dtype=fp16", "teachers.0.dtype=fp16", "teachers.1.dtype=fp16", "parallel.tensor=2"]
RUN = [*FP16, "train.steps=12", "train.save_every=6", "rollout.prompts_per_step=16", "train.micro_batch_size=8"]
FIRST = 2.0**13


@pytest.mark.slow
def test_it_learns_and_resumes_bitwise(tmp_path):
    whole = tmp_path / "whole"
    settings = [*RUN, f"optim.initial_loss_scale={FIRST}", "train.max_skipped=0"]
    done = train(whole, *settings)
    assert done.returncode == 0, done.stderr
    told = rows(whole)
    scales = [row["loss_scale"] for row in told]
    skipped = [row["step/skipped"] for row in told]
    assert scales[0] == FIRST
    assert skipped[0] == 1
    assert sum(skipped) <= 8, "the scale has not settled where this test wants it"
    for now, after, was_skipped in zip(scales, scales[1:], skipped, strict=False):
        assert after == (now / 2 if was_skipped else now)
    assert done.stderr.count("gradients overflow fp16") == sum(skipped)
    assert told[-1]["kl/ensemble"] < 0.9 * told[0]["kl/ensemble"]
    weights = load_file(whole / "hf/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in weights.values())

    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/step_00000012")
    done = train(cut, *settings)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 6" in done.stderr
    assert rows(cut) == rows(whole)
    assert exported(cut) == exported(whole)
