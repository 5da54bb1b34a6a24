"""Hugging Face directories, written and read: complete or invisible, sharded, with everything beside the weights."""

import json
import os
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from megatron_opd.models import output_dir
from megatron_opd.models.hf_dir import HFWriter, write
from megatron_opd.models.safetensors_dir import TensorDir


@pytest.fixture
def model_dir(tmp_path):
    """A model with what real ones have beside it."""
    directory = tmp_path / "hf"
    tiny.save(tiny.build("qwen3"), directory)
    for name in ("tokenizer.model", "tokenizer.json", "generation_config.json", "chat_template.jinja", "merges.txt"):
        (directory / name).write_text("{}")
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.gguf", "loop.json", "__0_0.distcp"):
        (directory / name).write_text("weights in another form")
    (directory / ".git").mkdir()
    (directory / "absent.bin").symlink_to("nowhere")
    (directory / "absent.txt").symlink_to("nowhere")
    return directory


def weights(model_dir):
    return load_file(model_dir / "model.safetensors")


@pytest.mark.parametrize("shard_bytes", [1 << 30, 9_000])
def test_round_trip(model_dir, tmp_path, shard_bytes):
    before = weights(model_dir)
    write(iter(before.items()), tmp_path / "out", like=model_dir, shard_bytes=shard_bytes)
    with TensorDir(tmp_path / "out") as tensors:
        assert tensors.names() == sorted(before)
        assert all(torch.equal(tensors.read(name), tensor) for name, tensor in before.items())
    files = list((tmp_path / "out").glob("*.safetensors"))
    found = {}
    for file in files:
        found |= load_file(file)  # the library itself accepts what we wrote
    assert found.keys() == before.keys()
    index = tmp_path / "out/model.safetensors.index.json"
    assert index.is_file() == (len(files) > 1)
    if len(files) > 1:
        said = json.loads(index.read_text())
        assert said["metadata"]["total_size"] == sum(t.numel() * 4 for t in before.values())
        assert {name: file.name for file in files for name in load_file(file)} == said["weight_map"]


def test_everything_but_weights_is_copied(model_dir, tmp_path):
    write(iter(weights(model_dir).items()), tmp_path / "out", like=model_dir)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    beside = {"tokenizer.model", "tokenizer.json", "generation_config.json", "chat_template.jinja", "merges.txt"}
    assert names == {"config.json", "model.safetensors", *beside}
    assert not list(tmp_path.glob("*.tmp"))


def test_files_that_are_relative_links_are_copied_and_dead_links_are_not(model_dir, tmp_path):
    """As in the cache of the hub."""
    source = tmp_path / "snapshots/one"
    source.mkdir(parents=True)
    for file in model_dir.iterdir():
        (source / file.name).symlink_to(os.path.relpath(file, source))
    (source / "gone.txt").symlink_to("../nowhere")
    for name, like in (("direct", model_dir), ("linked", source)):
        write(iter(weights(model_dir).items()), tmp_path / name, like=like)
    direct, linked = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("direct", "linked"))
    assert linked == direct
    assert not any(path.is_symlink() for path in (tmp_path / "linked").iterdir())


def test_config_says_the_type_of_the_weights(model_dir, tmp_path):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    half = {name: tensor.bfloat16() for name, tensor in weights(model_dir).items()}
    write(iter(half.items()), tmp_path / "out", like=model_dir)
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert after["dtype"] == "bfloat16"
    assert "torch_dtype" not in after


def test_until_the_end_there_is_no_model(model_dir, tmp_path):
    shapes = {name: tuple(tensor.shape) for name, tensor in weights(model_dir).items()}
    writer = HFWriter(tmp_path / "out", shapes, torch.float32, like=model_dir)
    writer.create()
    for name, tensor in weights(model_dir).items():
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.tmp/config.json").exists()  # what a killed process leaves does not load
        writer.put(name, tensor)
    writer.finish()
    assert (tmp_path / "out/config.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "missing weights: model.norm.weight"),
        (lambda w: w.update({"other": torch.ones(2)}), "'other' of shape"),
        (lambda w: w.update({"model.norm.weight": torch.ones(31)}), r"of shape \[31\] does not belong"),
        (lambda w: w.clear(), "missing weights"),
    ],
)
def test_a_failure_leaves_nothing(model_dir, tmp_path, change, message):
    changed = weights(model_dir)
    change(changed)
    with pytest.raises(ValueError, match=message):
        write(iter(changed.items()), tmp_path / "out", like=model_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_existing_model_is_replaced_only_at_the_end(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "out", symlinks=True)
    (tmp_path / "out/marker").touch()
    with pytest.raises(ValueError, match="missing weights"):
        write(iter({"model.norm.weight": torch.ones(32)}.items()), tmp_path / "out", like=model_dir)
    assert (tmp_path / "out/marker").is_file()
    write(iter(weights(model_dir).items()), tmp_path / "out", like=model_dir)
    assert not (tmp_path / "out/marker").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_a_model_goes_where_a_link_points(model_dir, tmp_path):
    """And is made there too: what looked for room looked there."""
    (tmp_path / "disk/empty").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/empty")
    assert output_dir.temporary(tmp_path / "out").parent == tmp_path / "disk"
    write(iter(weights(model_dir).items()), tmp_path / "out", like=model_dir)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk/empty/config.json").is_file()
    assert sorted(path.name for path in tmp_path.rglob("*tmp")) == []


def test_outputs_that_are_refused(model_dir, tmp_path, monkeypatch):
    def refused(out, message, **options):
        with pytest.raises(ValueError, match=message):
            output_dir.check_output(out, inputs=[model_dir], **{"num_bytes": 1000, **options})

    output_dir.check_output(tmp_path / "deep/er/out", inputs=[model_dir], num_bytes=1000)
    refused(model_dir, "must not be the same directory")
    refused(model_dir / "out", "or one within the other")
    refused(tmp_path, "or one within the other")
    refused("/", "/ is a mount point, which cannot be replaced; name a directory in it")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(".", "is the working directory, which cannot be replaced")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is not a directory")
    (tmp_path / "empty").mkdir()
    output_dir.check_output(tmp_path / "empty", inputs=[model_dir], num_bytes=1000)
    (tmp_path / "empty/notes").touch()
    refused(tmp_path / "empty", "is not empty")
    refused(tmp_path / "empty", "--overwrite will not remove it", overwrite=True)
    (tmp_path / "empty/config.json").touch()
    output_dir.check_output(tmp_path / "empty", inputs=[model_dir], num_bytes=1000, overwrite=True)
    refused(tmp_path / "out", r"not enough room .* GB are free", num_bytes=1 << 60)


def test_slices_of_tensors(tmp_path, monkeypatch):
    tensor = torch.randn(10, 6).bfloat16()
    save_file({"a": tensor, "v": torch.arange(5.0)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("megatron_opd.models.safetensors_dir.READ_BYTES", 40)  # three rows at once
    with TensorDir(tmp_path) as tensors:
        assert tensors.shape("a") == [10, 6]
        assert tensors.dtype("a") == torch.bfloat16
        assert torch.equal(tensors.read("a"), tensor)
        assert torch.equal(tensors.read("a", slice(3, 7)), tensor[3:7])
        assert torch.equal(tensors.read("a", slice(None), slice(2, 4)), tensor[:, 2:4])
        assert torch.equal(tensors.read("a", slice(1, 10), slice(0, 3)), tensor[1:, :3])
        assert tensors.read("a", slice(10, 10)).shape == (0, 6)
        assert torch.equal(tensors.read("v", slice(2, 9)), torch.arange(2.0, 5.0))


def test_damaged_safetensors_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        TensorDir(tmp_path)
    save_file({"a": torch.ones(100)}, file)
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:20], whole[:4], b"", b"\xff" * 100, whole.replace(b"[100]", b"[101]")):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"):
            TensorDir(tmp_path)
    save_file({"a": torch.ones(100, dtype=torch.int8)}, file)
    with pytest.raises(ValueError, match="'a' has type I8; known: F32"):
        TensorDir(tmp_path).dtype("a")


def test_damaged_indices_are_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 5}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="is not an index of safetensors"):
            TensorDir(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(ValueError, match=r"the index names one\.safetensors, which does not exist"):
        TensorDir(tmp_path).shape("a")
    save_file({"b": torch.ones(3)}, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"the index says that 'a' is in one\.safetensors, but it is not"):
        TensorDir(tmp_path).shape("a")
