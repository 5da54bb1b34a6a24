"""The student's weights in FP8 for servers: the gate's numbers, what is refused, and how buckets hold them."""

import asyncio
import base64
import json
import pickle
from types import SimpleNamespace

import pytest
import tiny
import torch

from megatron_opd.config import RolloutConfig, ServersConfig, StudentConfig
from megatron_opd.models.architecture import read_architecture
from megatron_opd.models.weight_map import all_rules
from megatron_opd.precision.quantize import Rounding
from megatron_opd.precision.recipes import RECIPES
from megatron_opd.sglang.errors import Unfit
from megatron_opd.sglang.weights import fp8_weights
from megatron_opd.sglang.weights.buckets import buckets
from megatron_opd.sglang.weights.fp8_weights import SCALE, check_server, is_matrix, problems, quantized
from megatron_opd.sglang.weights.tensor import _pickled

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
FITS = RolloutConfig(engine="sglang", quantization="fp8")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(weights of a student in bf16 by Hugging Face's names, its directory)."""
    made = tiny.build("qwen3", **SIZES).bfloat16()
    return dict(made.state_dict()), tiny.save(made, tmp_path_factory.mktemp("model") / "qwen3")


def test_the_matrices_are_those_of_the_gate_bit_for_bit(model):
    """In Megatron's own layout, as the gate's emulation rounds it: q, k and v in one, gate and up in one."""
    weights, directory = model
    sent = dict(quantized(iter(weights.items())))
    rounding, count = Rounding(RECIPES["blockwise"].weights), 0
    for name, rule in all_rules(read_architecture(directory)).items():
        if not (".linear_" in name and name.endswith(".weight")):
            continue
        parts = rule.merge([torch.zeros(rule.shape, dtype=torch.bfloat16)])
        whole = fused(rule, {hf: weights[hf] for hf, _ in parts})
        for hf, tensor in rule.merge([rounding(whole)]):
            values, scales = sent[hf], sent[hf + SCALE]
            assert (values.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
            assert scales.shape == (-(-values.shape[0] // 128), -(-values.shape[1] // 128))
            wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: values.shape[0], : values.shape[1]]
            assert torch.equal(values.float() * wide, tensor.float())
            assert not torch.equal(tensor, weights[hf]), "it must have been rounded"
            count += 1
    assert count == 7 * sum(name.endswith("q_proj.weight") for name in weights)


def fused(rule, weights):
    """Megatron's tensor of some Hugging Face ones: the one whose merge gives them back."""
    numbers = torch.arange(rule.shape[0] * rule.shape[1])
    whole = torch.empty(numbers.numel(), dtype=torch.bfloat16)
    for name, places in rule.merge([numbers.view(rule.shape)]):
        whole[places.reshape(-1)] = weights[name].reshape(-1)
    return whole.view(rule.shape)


def test_everything_else_is_sent_as_it_is_and_in_order(model):
    weights, _ = model
    sent = list(quantized(iter(weights.items())))
    assert [name for name, _ in sent if not name.endswith(SCALE)] == list(weights)
    kept = [name for name in weights if not is_matrix(name)]
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(kept)
    assert all(dict(sent)[name] is weights[name] for name in kept)


def test_buckets_of_several_types_are_as_few_as_their_bytes_allow(model):
    weights, _ = model
    sent = list(quantized(iter(weights.items())))
    made = list(buckets(iter(sent), 1 << 20))
    total = sum(tensor.numel() * tensor.element_size() for _, tensor in sent)
    assert len(made) <= 3 * (total // (1 << 20) + 1)
    again = {name: tensor for bucket in made for name, tensor in bucket.tensors()}
    assert again.keys() == dict(sent).keys()
    for name, tensor in sent:
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8))


def test_inside_a_request_a_matrix_is_bytes_that_any_unpickler_reads():
    """torch's own pickle of FP8 has a storage without a type, and SGLang's unpickler ends the server at it."""
    matrix = torch.randn(3, 5).to(torch.float8_e4m3fn)
    (bucket,) = buckets(iter([("a", matrix), ("b", matrix.t().contiguous())]))
    data = base64.b64decode(_pickled(bucket))
    assert b"UntypedStorage" not in data
    for (name, found), expected in zip(pickle.loads(data), (matrix, matrix.t()), strict=True):
        assert (name in "ab", found.dtype) == (True, torch.float8_e4m3fn)
        assert torch.equal(found.float(), expected.float())


@pytest.mark.parametrize(
    ("changes", "servers", "student", "words"),
    [
        ({"sync": "disk"}, {}, {}, "needs rollout.sync: broadcast or tensor, not disk"),
        ({}, {}, {"dtype": "fp32"}, "set student.dtype or rollout.servers.dtype to bf16"),
        ({}, {"tensor": 4}, {}, "needs multiples of 128, but the intermediate size of student.model is 96"),
        ({}, {"args": ["--quantization", "fp8"]}, {}, "--quantization is set by rollout.quantization: fp8"),
        ({}, {"args": ["--load-format=auto"]}, {}, "--load-format is set by rollout.quantization: fp8"),
        ({"quantization": "none"}, {"args": ["--quantization=fp8"]}, {}, "do not reach a server with --quantization"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_write(model, changes, servers, student, words):
    rollout = RolloutConfig(
        **{"engine": "sglang", "quantization": "fp8", "servers": ServersConfig(**servers), **changes}
    )
    (found,) = problems(rollout, StudentConfig(**{"model": model[1], "dtype": "bf16", **student}))
    assert words in found


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_families_whose_new_weights_would_be_lost(tmp_path, family):
    (found,) = problems(FITS, StudentConfig(model=tiny.save(tiny.build(family), tmp_path / family), dtype="bf16"))
    assert f"not of {family}" in found


def test_what_fits_is_no_problem(model):
    for sync in ("broadcast", "tensor"):
        rollout = RolloutConfig(engine="sglang", quantization="fp8", sync=sync)
        assert problems(rollout, StudentConfig(model=model[1], dtype="bf16")) == []
    assert problems(RolloutConfig(), StudentConfig(model="nowhere")) == []
    assert problems(FITS, StudentConfig(model="nowhere", dtype="bf16")) == [], "which is said elsewhere"


@pytest.mark.parametrize("capability", [None, (9, 0), (10, 0)])
def test_scales_stay_as_they_are_sent(monkeypatch, capability):
    """Blackwell's DeepGEMM would pack them, so that new ones do not fit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    arguments = fp8_weights.arguments()
    settings = json.loads(arguments[arguments.index("--json-model-override-args") + 1])["quantization_config"]
    assert settings["weight_block_size"] == list(fp8_weights.SCALING.block)
    assert ("triton" in arguments) == (capability == (10, 0))


@pytest.mark.parametrize(
    ("started_with", "in_fp8", "words"),
    [
        (None, True, 'needs a server that was started with --json-model-override-args \'{"quantization_config"'),
        ("not JSON", True, "needs a server that was started with"),
        ("ours", True, None),
        ("ours", False, "this server is quantised"),
        (None, False, None),
    ],
)
def test_a_server_says_how_it_was_started(started_with, in_fp8, words):
    arguments = fp8_weights.arguments()
    override = arguments[1] if started_with == "ours" else started_with

    async def server_info():
        return {"json_model_override_args": override} if override else {"quantization": None}

    client = SimpleNamespace(url="http://server", server_info=server_info)
    if words is None:
        asyncio.run(check_server(client, in_fp8=in_fp8))
        return
    with pytest.raises(Unfit, match=words):
        asyncio.run(check_server(client, in_fp8=in_fp8))
