"""Mixtures of experts out of a converted checkpoint: logits, exported weights and the embedded engine.

Steps and gradients of mixtures are in test_step_invariance.py.
"""

import pytest
import tiny
import torch
from safetensors.torch import load_file

from megatron_opd.core.batching import pack
from megatron_opd.core.types import Sampling
from megatron_opd.models import convert

LAYOUTS = {
    "tp1": {"tensor": 1},
    "pp2": {"pipeline": 2},
    "dp2ep2": {"data": 2, "expert": 2},
    "tp2ep2sp": {"tensor": 2, "expert": 2, "sequence": True},
    "tp2pp2ep2sp": {"tensor": 2, "pipeline": 2, "expert": 2, "sequence": True},
}


@pytest.fixture(scope="module")
def model():
    return tiny.build("qwen3_moe", vocab_size=94)


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    """(Hugging Face directory, the checkpoint converted from it)."""
    directory = tmp_path_factory.mktemp("moe")
    tiny.save(model, directory / "hf")
    convert.to_megatron(convert.plan_to_megatron(directory / "hf"), directory / "hf", directory / "mg")
    return directory / "hf", directory / "mg"


def batches():
    rollouts = tiny.rollouts(count=4)
    return pack(rollouts, micro_batch_size=2, length_multiple=4, device=torch.device("cpu"))


def logits_and_weights(parallel, checkpoint, dtype):
    from megatron_opd.models.architecture import read_architecture
    from megatron_opd.student import pipeline, weights
    from megatron_opd.student import source as weights_source
    from megatron_opd.student.model import DTYPES, build_gpt, transformer_config

    arch = read_architecture(checkpoint)
    model = build_gpt(arch, transformer_config(arch, parallel, dtype=DTYPES[dtype]), parallel)
    weights_source.load(model, arch, checkpoint, parallel)
    logits = pipeline.forward(model.eval(), batches(), lambda _, logits_BSL: logits_BSL)
    return logits, {name: tensor.clone() for name, tensor in weights.export(model, arch, parallel)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_logits_and_exported_weights(ranks, model, source, layout):
    hf, checkpoint = source
    num_ranks = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)
    answers = ranks.run(num_ranks, logits_and_weights, checkpoint, "fp32", **layout)
    files = load_file(hf / "model.safetensors")
    for _, exported in answers[:: layout.get("tensor", 1)][: layout.get("data", 1)]:
        assert exported.keys() == files.keys()
        assert all(torch.equal(exported[name], files[name]) for name in files)
    shards = [logits for logits, _ in answers if logits][: layout.get("tensor", 1)]
    for batch, *parts in zip(batches(), *shards, strict=True):
        with torch.no_grad():
            expected = model(batch.tokens_BS).logits
        torch.testing.assert_close(torch.cat(parts, dim=-1), expected, atol=2e-5, rtol=0)


def test_exported_bf16_is_bit_identical(ranks, model, tmp_path):
    tiny.save(tiny.build("qwen3_moe").bfloat16(), tmp_path / "hf")
    convert.to_megatron(convert.plan_to_megatron(tmp_path / "hf"), tmp_path / "hf", tmp_path / "mg")
    answers = ranks.run(2, logits_and_weights, tmp_path / "mg", "bf16", **{"tensor": 2, "expert": 2, "sequence": True})
    files = load_file(tmp_path / "hf/model.safetensors")
    assert answers[0][1].keys() == files.keys()
    assert all(torch.equal(answers[0][1][name], files[name]) for name in files)


@torch.no_grad()
def test_the_embedded_engine_takes_exported_experts(model, source):
    from megatron_opd.rollout.embedded_engine import LocalEngine

    hf, checkpoint = source
    engine = LocalEngine(checkpoint, eos_ids=(2,), vocab_size=94)  # a checkpoint has the config, not the weights
    ids = torch.arange(3, 40)[None]
    assert not torch.allclose(engine.model(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="is a Megatron checkpoint, which this engine cannot read"):
        engine.generate([], Sampling(max_new_tokens=1, temperature=0))
    engine.load(iter(load_file(hf / "model.safetensors").items()), version=7)
    torch.testing.assert_close(engine.model(ids).logits, model(ids).logits, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match=r"did not arrive at the engine: .*mlp\.experts\.3\.gate_proj"):
        engine.load(((n, t) for n, t in load_file(hf / "model.safetensors").items() if ".3.gate" not in n), version=8)
