"""run.deterministic on a GPU: the same steps twice are the same bits."""

import pytest
import steps
import tiny
import torch

from megatron_opd.student import deterministic

pytestmark = pytest.mark.gpu
VOCAB_SIZE = 90


def twice(parallel, made):
    """Weights after the same three steps of two students."""
    deterministic.enable()
    rollouts = tiny.rollouts(count=8, vocab_size=VOCAB_SIZE)
    try:
        return [steps.train(parallel, made, rollouts, VOCAB_SIZE, 3)[2] for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_bits_again(ranks, tmp_path, dtype):
    path, teacher = (tiny.save(tiny.build("qwen3", seed=n), tmp_path / f"m{n}") for n in range(2))
    made = tiny.config(
        path,
        [{"name": "teacher", "model": teacher, "dtype": dtype}],
        student={"dtype": dtype},
        train={"steps": 4, "micro_batch_size": 2},
    )
    first, again = ranks.run(1, twice, made)[0]
    assert first.keys() == again.keys()
    assert all(torch.equal(x, again[name]) for name, x in first.items())
