"""A model directory's digest changes with its files, and with nothing else."""

import pytest

from megatron_opd.models.sampled_digest import sampled_digest

SIZE = 1_000_000


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    (tmp_path / "model.safetensors").write_bytes(bytes(range(250)) * (SIZE // 250))
    (tmp_path / "README.md").write_text("a model")
    return tmp_path


def test_the_same_files_elsewhere_have_the_same_digest(model, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for path in model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert sampled_digest(other) == sampled_digest(model) != ""
    (other / "README.md").write_text("other words")
    assert sampled_digest(other) == sampled_digest(model)


@pytest.mark.parametrize("place", [0, 4095, SIZE // 15 + 10, SIZE - 1])
def test_other_weights_have_another(model, place):
    before, whole = sampled_digest(model), sampled_digest(model, has_weights=False)
    data = bytearray((model / "model.safetensors").read_bytes())
    data[place] ^= 1
    (model / "model.safetensors").write_bytes(data)
    assert sampled_digest(model) != before
    assert sampled_digest(model, has_weights=False) == whole
    (model / "model.safetensors").write_bytes(data[:-1])
    assert sampled_digest(model) != before


def test_a_new_config_or_tokenizer_has_another(model):
    before = sampled_digest(model, has_weights=False)
    (model / "generation_config.json").write_text("{}")
    after = sampled_digest(model, has_weights=False)
    assert after != before
    (model / "generation_config.json").write_text("[]")
    assert sampled_digest(model, has_weights=False) not in (before, after)


def test_small_files_of_weights_and_places_without_any(tmp_path):
    (tmp_path / "one.safetensors").write_bytes(b"abc")
    one = sampled_digest(tmp_path)
    (tmp_path / "one.safetensors").write_bytes(b"abd")
    assert sampled_digest(tmp_path) != one
    assert sampled_digest(tmp_path / "nowhere") == ""
