"""The deterministic mode (run.deterministic) goes through whole steps, and changes nothing but the order of sums."""

import os

import pytest
import steps
import tiny
import torch

from megatron_opd.student import deterministic

VOCAB_SIZE = 90


def in_both_modes(parallel, made):
    """(metrics of two steps without, with, what the model was told)."""
    rollouts = tiny.rollouts(count=4, vocab_size=VOCAB_SIZE)
    plain, *_ = steps.train(parallel, made, rollouts, VOCAB_SIZE, 2)
    before = dict(os.environ)
    deterministic.enable()
    try:
        student, *_ = steps.build(parallel, made, VOCAB_SIZE)
        again, *_ = steps.train(parallel, made, rollouts, VOCAB_SIZE, 2)
    finally:  # the process has other tests to run
        torch.use_deterministic_algorithms(False)
        os.environ.clear()
        os.environ.update(before)
    return plain, again, student.gpt.config.deterministic_mode


@pytest.mark.parametrize("tensor", [1, 2])
def test_steps_are_the_same_to_rounding(ranks, tmp_path, tensor):
    path, teacher = (tiny.save(tiny.build("qwen3", seed=n), tmp_path / f"m{n}") for n in range(2))
    made = tiny.config(path, [{"name": "teacher", "model": teacher}], train={"steps": 4, "micro_batch_size": 2})
    plain, again, told = ranks.run(tensor, in_both_modes, made, tensor=tensor)[0]
    assert told
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in plain], abs=1e-6)
    assert [row["grad_norm"] for row in again] == pytest.approx([row["grad_norm"] for row in plain], rel=1e-5, abs=1e-6)
