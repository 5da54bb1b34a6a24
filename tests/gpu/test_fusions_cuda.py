"""Fused layers on a GPU with Transformer Engine: steps and gradients as without, and the mark that each weight has."""

from unittest import mock

import pytest
import steps
import tiny

pytestmark = pytest.mark.gpu
VOCAB_SIZE = 90
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_hidden_layers": 3}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("transformer_engine.pytorch")
    root = tmp_path_factory.mktemp("models")
    made = [tiny.build("qwen3", seed=seed, vocab_size=96, **SIZES).bfloat16() for seed in range(2)]
    return [tiny.save(one, root / str(seed)) for seed, one in enumerate(made)]


def trained(parallel, config, rollouts, fuses):
    """[metrics by step], gradients after them in float32, how many modules add to main_grad themselves."""
    from megatron_opd.student import fusions

    chosen = fusions.chosen if fuses else lambda *_, **__: fusions.Fusions()
    with mock.patch.object(fusions, "chosen", chosen):
        student, objective, pack = steps.build(parallel, config, VOCAB_SIZE)
    batches = pack(rollouts)
    gradients = student.gradients(batches, objective)
    metrics = [student.step(batches, objective) for _ in range(3)]
    count = sum(getattr(module, "fuse_wgrad_accumulation", False) for module in student.gpt.modules())
    return metrics, gradients, count


@pytest.mark.parametrize("packing", [False, True])
def test_fused_steps_are_those_without(ranks, models, packing):
    config = tiny.config(
        models[0],
        [{"name": "t", "model": models[1], "dtype": "bf16"}],
        student={"dtype": "bf16"},
        train={"steps": 10, "micro_batch_size": 2, "packing": packing},
    )
    rollouts = tiny.rollouts(count=6, vocab_size=VOCAB_SIZE)
    ((metrics, gradients, count),) = ranks.run(1, trained, config, rollouts, True)
    ((plain, unfused, none),) = ranks.run(1, trained, config, rollouts, False)
    assert (count, none) == (4 * SIZES["num_hidden_layers"], 0)
    for mine, theirs in zip(metrics, plain, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.02, abs=1e-3)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)
    apart = sum(float((a - b).pow(2).sum()) for a, b in zip(gradients, unfused, strict=True))
    assert apart <= 0.05**2 * sum(float(b.pow(2).sum()) for b in unfused)
