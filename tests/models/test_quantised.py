"""Quantised checkpoints are refused by that word, whichever file or tensor tells."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from megatron_opd.models.architecture import read_architecture
from megatron_opd.models.headers import check_tensors


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(whole, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tmp_path.__class__(whole) / name).read_bytes())
    return tmp_path


def told(model):
    return check_tensors(model, read_architecture(model))


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}, "(fp8)"),
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "(awq)"),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "(bitsandbytes)"),
        ("quantization_config", {"load_in_8bit": True}, "(quantization_config)"),
        ("compression_config", {"format": "pack-quantized"}, "quantised"),
    ],
)
def test_config_json_tells(model, key, value, word):
    tree = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**tree, key: value}))
    (problem,) = told(model)
    assert "the checkpoint is quantised" in problem
    assert word in problem
    assert "bf16 first" in problem


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_a_file_beside_it_tells(model, name):
    (model / name).write_text("{}")
    (problem,) = told(model)
    assert f"the checkpoint is quantised ({name})" in problem


@pytest.mark.parametrize("end", ["weight_scale_inv", "qweight", "weight.absmax", "scales"])
def test_tensors_tell(model, end):
    path = model / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, f"model.layers.0.mlp.up_proj.{end}": torch.zeros(2)}, path, metadata={"format": "pt"})
    (problem,) = told(model)
    assert f"quantised (tensor model.layers.0.mlp.up_proj.{end})" in problem


@pytest.mark.parametrize("nothing", [None, {}])
def test_nothing_told_is_nothing_said(model, nothing):
    tree = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**tree, "quantization_config": nothing}))
    assert told(model) == []
