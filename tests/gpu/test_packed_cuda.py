"""Packed sequences in Transformer Engine's attention: the steps of unpacked micro-batches, up to bf16's rounding."""

import pytest
import steps
import test_fp8_cuda
import tiny

pytestmark = pytest.mark.gpu
VOCAB_SIZE = 90
NUM_STEPS = 2


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    pytest.importorskip("transformer_engine.pytorch")
    root = tmp_path_factory.mktemp("models")
    made = {name: tiny.build("qwen3", vocab_size=96, seed=n, **test_fp8_cuda.SIZES) for n, name in enumerate("st")}
    return [tiny.save(model.bfloat16(), root / name) for name, model in made.items()]


def test_packed_steps_are_the_unpacked_ones(ranks, paths):
    rollouts = tiny.rollouts(count=8, vocab_size=VOCAB_SIZE)
    found = []
    for packing in (False, True):
        made = tiny.config(
            paths[0],
            [{"name": "t", "model": paths[1], "dtype": "bf16"}],
            student={"dtype": "bf16"},
            train={"packing": packing, "steps": 4, "micro_batch_size": 4},
        )
        metrics, evaluation, _ = ranks.run(1, steps.train, made, rollouts, VOCAB_SIZE, NUM_STEPS)[0]
        found.append((metrics, evaluation))
    (plain, plain_evaluation), (packed, packed_evaluation) = found
    for one, other in zip(packed, plain, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)
    assert packed_evaluation.keys() == plain_evaluation.keys()
