"""A smaller model: the layers that stay compute what they did, and everything beside the weights stays."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from megatron_opd.__main__ import main


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return Path(tiny.save(tiny.build("qwen3", num_hidden_layers=5), tmp_path_factory.mktemp("models") / "qwen3"))


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@torch.no_grad()
@pytest.mark.parametrize(("drop", "kept"), [(["1", "3"], [0, 2, 4]), (["2-4"], [0, 1]), (["0", "1-2"], [3, 4])])
def test_it_is_the_model_without_these_layers(model_dir, tmp_path, capsys, drop, kept):
    (model_dir / "notes.txt").write_text("beside the weights")
    assert main(["prune", str(model_dir), str(tmp_path / "small"), "--drop", *drop]) == 0
    assert f"{len(kept)} of 5 layers" in capsys.readouterr().out
    expected = load(model_dir)
    expected.model.layers = torch.nn.ModuleList(expected.model.layers[i] for i in kept)
    for i, layer in enumerate(expected.model.layers):
        layer.self_attn.layer_idx = i
    ids = torch.arange(3, 23).view(2, 10)
    small = load(tmp_path / "small")
    assert torch.equal(small(ids, use_cache=False).logits, expected(ids, use_cache=False).logits)
    assert (tmp_path / "small/notes.txt").read_text() == "beside the weights"
    config = json.loads((tmp_path / "small/config.json").read_text())
    assert config["num_hidden_layers"] == len(kept)
    assert len(config.get("layer_types", kept)) == len(kept)


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        (["5"], "there is no layer 5; the model has layers 0 to 4"),
        (["-1"], "'-1' is neither a layer"),
        (["1-x"], "'1-x' is neither a layer"),
        (["0-4"], "takes all layers out"),
    ],
)
def test_what_cannot_be_dropped(model_dir, tmp_path, capsys, drop, said):
    assert main(["prune", str(model_dir), str(tmp_path / "small"), f"--drop={drop[0]}"]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_a_dry_run_and_a_model_that_is_there(model_dir, tmp_path, capsys):
    out = tmp_path / "small"
    assert main(["prune", str(model_dir), str(out), "--drop", "1", "--dry-run"]) == 0
    assert not out.exists()
    assert main(["prune", str(model_dir), str(out), "--drop", "1"]) == 0
    assert main(["prune", str(model_dir), str(out), "--drop", "2"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["prune", str(model_dir), str(out), "--drop", "2", "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
