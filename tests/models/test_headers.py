"""What headers alone reveal about a model directory of either kind."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from megatron_opd.models import convert, headers
from megatron_opd.models.architecture import read_architecture
from megatron_opd.models.describe import describe
from megatron_opd.models.headers import check_tensors


@pytest.fixture
def model_dir(tmp_path):
    tiny.save(tiny.build("qwen3"), tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def checkpoint(model_dir, tmp_path):
    convert.to_megatron(convert.plan_to_megatron(model_dir), model_dir, tmp_path / "mg")
    return tmp_path / "mg"


def change_weights(directory, change):
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def change_config(directory, **settings):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **settings}))


def problems(directory):
    return check_tensors(directory, read_architecture(directory))


def test_nothing_is_wrong(model_dir, checkpoint):
    assert problems(model_dir) == []
    assert problems(checkpoint) == []


def test_tensors_that_are_missing_left_over_or_of_another_shape(model_dir):
    change_weights(model_dir, lambda w: w.pop("model.norm.weight"))
    assert problems(model_dir) == [f"{model_dir}: tensor 'model.norm.weight' is missing"]
    change_weights(model_dir, lambda w: w.update({"model.norm.weight": torch.ones(30)}))
    assert problems(model_dir) == [f"{model_dir}: 'model.norm.weight' has shape [30], but config.json says [32]"]
    change_weights(model_dir, lambda w: w.update({"model.norm.weight": torch.ones(32), "model.extra": torch.ones(2)}))
    assert problems(model_dir) == [f"{model_dir}: tensor 'model.extra' does not belong to the model of its config.json"]


def test_harmless_extras_of_old_writers(model_dir, tmp_path):
    change_weights(model_dir, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    assert problems(model_dir) == []
    tiny.save(tiny.build("qwen3_tied"), tmp_path / "tied")
    change_weights(tmp_path / "tied", lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert problems(tmp_path / "tied") == []
    assert convert.plan_to_megatron(tmp_path / "tied").dtype == torch.float32


@pytest.mark.parametrize("rows", [95, 96])
def test_a_head_of_its_own_beside_tied_embeddings(tmp_path, rows, monkeypatch):
    """transformers would not tie them then, whatever config.json says."""
    monkeypatch.setattr(headers, "_ROWS", 40)
    tied = tmp_path / "tied"
    tiny.save(tiny.build("qwen3_tied"), tied)

    def add_head(weights):
        head = weights["model.embed_tokens.weight"][:rows].clone()
        head[-1, -1] += 1
        weights["lm_head.weight"] = head

    change_weights(tied, add_head)
    (problem,) = problems(tied)
    assert "'lm_head.weight' is not 'model.embed_tokens.weight'" in problem
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        convert.plan_to_megatron(tied)


def test_only_the_first_problems_are_listed(model_dir):
    change_config(model_dir, num_hidden_layers=4)
    found = problems(model_dir)
    assert len(found) == 4
    assert found[-1] == f"{model_dir}: and {2 * 11 - 3} more like these"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 3}, "has shape [2, "),
        ({"intermediate_size": 44}, "mlp.linear_fc1.weight' has shape [2, 80, 32], but config.json says [2, 88, 32]"),
        ({"vocab_size": 97}, "embedding.word_embeddings.weight' has shape [96, 32], but config.json says [97, 32]"),
        ({"tie_word_embeddings": True}, "tensor 'output_layer.weight' does not belong to the model of its config.json"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "linear_qkv.bias' is missing"),
    ],
)
def test_a_checkpoint_that_contradicts_its_config(checkpoint, settings, message):
    change_config(checkpoint, **settings)
    assert any(message in problem for problem in problems(checkpoint))


def test_a_smaller_vocabulary_is_padding(checkpoint):
    change_config(checkpoint, vocab_size=90)
    assert problems(checkpoint) == []


def test_a_checkpoint_cut_short(checkpoint):
    (file,) = checkpoint.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:1000])
    assert any("is cut short: 1000 bytes of" in problem for problem in problems(checkpoint))


def test_describing_either_kind(model_dir, checkpoint):
    ours, theirs = describe(model_dir), describe(checkpoint)
    assert ours["parameters"] == theirs["parameters"] == sum(p.numel() for p in tiny.build("qwen3").parameters())
    for facts in (ours, theirs):
        assert (facts["architecture"], facts["family"], facts["layers"]) == ("Qwen3ForCausalLM", "qwen3", 2)
        assert (facts["dtype"], facts["problems"]) == ("float32", [])
        assert facts["bytes on disk"] > 4 * facts["parameters"]
    assert theirs["optimizer"] is False


def test_describing_what_is_damaged(model_dir, checkpoint, tmp_path):
    change_config(model_dir, architectures=["GPT2LMHeadModel"])
    facts = describe(model_dir)
    assert "architecture GPT2LMHeadModel is not supported; known: LlamaForCausalLM, " in facts["problems"][0]
    (checkpoint / "config.json").unlink()
    assert "has no config.json; name a directory" in describe(checkpoint)["problems"][0]
    with pytest.raises(ValueError, match="is not a directory"):
        describe(tmp_path / "absent")


def test_types_that_are_mixed_or_too_narrow(model_dir, tmp_path):
    change_weights(model_dir, lambda w: w.update({"model.norm.weight": w["model.norm.weight"].bfloat16()}))
    with pytest.raises(ValueError, match="mixes the types bfloat16, float32; choose the output's with --dtype"):
        convert.plan_to_megatron(model_dir)
    change_weights(model_dir, lambda w: w.update({"model.norm.weight": torch.full((32,), 1e6)}))
    plan = convert.plan_to_megatron(model_dir, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"final_layernorm\.weight has the value 1e\+06, which overflows float16"):
        convert.to_megatron(plan, model_dir, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
