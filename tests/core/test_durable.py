"""What is complete when it is there is on disk before it gets its name: whatever a run or a tool writes so."""

import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch

from megatron_opd.config import LoraConfig
from megatron_opd.config.file import record
from megatron_opd.core import durable
from megatron_opd.core.whole_file import write_whole
from megatron_opd.models import adapter_dir, convert, hf_dir
from megatron_opd.models.safetensors_dir import TensorDir


@pytest.fixture
def happened(monkeypatch):
    """What was synced and renamed, in order, by the names of then: ("sync", path) or ("rename", from, to)."""
    seen, fsync, rename, replace = [], os.fsync, os.rename, os.replace

    def noting_fsync(descriptor):
        fsync(descriptor)
        seen.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def noting(real):
        def renaming(source, target):
            real(source, target)
            seen.append(("rename", str(source), str(target)))

        return renaming

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting(rename))
    monkeypatch.setattr(os, "replace", noting(replace))
    return seen


def assert_durable(happened, place):
    """That all of `place` was synced under the name that it was made with, then renamed, then the name synced."""
    (at,) = [i for i, (what, *paths) in enumerate(happened) if what == "rename" and paths[1] == str(place)]
    made = Path(happened[at][1])
    below = [made / path.relative_to(place) for path in place.rglob("*")] if place.is_dir() else []
    synced = {paths[0] for what, *paths in happened[:at] if what == "sync"}
    assert {str(path) for path in [made, *below]} <= synced
    assert ("sync", str(place.parent)) in happened[at:]


def test_a_whole_file(tmp_path, happened):
    write_whole(tmp_path / "file", "text")
    assert_durable(happened, tmp_path / "file")


def test_the_config_of_a_run(tmp_path, happened):
    record({"a": 1}, tmp_path / "config.yaml", write_whole)
    assert_durable(happened, tmp_path / "config.yaml")


@pytest.fixture
def model(tmp_path):
    tiny.save(tiny.build("qwen3"), tmp_path / "model")
    (tmp_path / "model/original/deep").mkdir(parents=True)
    (tmp_path / "model/original/deep/params.json").write_text("{}")
    return tmp_path / "model"


def tensors(model):
    with TensorDir(model) as opened:
        yield from ((name, opened.read(name)) for name in opened.names())


@pytest.mark.parametrize("is_there", [False, True])
def test_an_exported_model(tmp_path, model, happened, is_there):
    for _ in range(1 + is_there):
        happened.clear()
        hf_dir.write(tensors(model), tmp_path / "out", like=model, shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert (tmp_path / "out/original/deep/params.json").is_file()
    assert_durable(happened, tmp_path / "out")


def test_converted_models(tmp_path, model, happened):
    convert.to_megatron(convert.plan_to_megatron(model), model, tmp_path / "mg")
    assert_durable(happened, tmp_path / "mg")
    convert.to_hf(convert.plan_to_hf(tmp_path / "mg", like=model), tmp_path / "mg", tmp_path / "back", like=model)
    assert_durable(happened, tmp_path / "back")


@pytest.mark.parametrize("is_there", [False, True])
def test_adapters(tmp_path, happened, is_there):
    adapters = [("a.lora_A.weight", torch.ones(2, 3))]
    for _ in range(1 + is_there):
        happened.clear()
        adapter_dir.write(adapters, tmp_path / "adapter", LoraConfig(rank=2), base="b")
    assert_durable(happened, tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_new_directories_have_their_names_on_disk(tmp_path, happened):
    durable.make_directory(tmp_path / "a/b/c")
    assert happened == [("sync", str(path)) for path in (tmp_path, tmp_path / "a", tmp_path / "a/b")]
    durable.make_directory(tmp_path / "a/b/c")
    assert len(happened) == 3


def test_directories_that_cannot_be_synced_are_no_error(tmp_path, monkeypatch):
    @contextmanager
    def answering(number):
        def refuse(_):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", refuse)
            yield

    (tmp_path / "file").touch()
    with answering(22):
        durable.sync(tmp_path)
        with pytest.raises(OSError, match="Invalid argument"):
            durable.sync(tmp_path / "file")
    with answering(5), pytest.raises(OSError, match="Input/output"):
        durable.sync(tmp_path)
