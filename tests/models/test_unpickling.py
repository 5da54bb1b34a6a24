"""Directories of checkpoints from people who want to run code on this machine: nothing of it runs."""

import collections
import functools
import io
import os
import pickle
import pickletools
import shutil
from pathlib import Path

import pytest
import torch
from program import CONFIG, MODELS, assert_user_error, here

from megatron_opd.__main__ import main
from megatron_opd.models import convert, unpickling
from megatron_opd.models.torch_dist_dir import Region, TorchDistDir, write


class Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


def ways(trace):
    """Objects that make a file `trace` when they are unpickled with all classes at hand."""
    return {
        "os.mkdir": Calls(os.mkdir, str(trace)),
        "open": Calls(open, str(trace), "w"),
        "eval": Calls(eval, f"__import__('os').mkdir({str(trace)!r})"),
        "exec": Calls(exec, f"import os; os.mkdir({str(trace)!r})"),
        "pathlib": Calls(Path.touch, trace),
        "torch.save": Calls(torch.save, 0, str(trace)),
        "a partial": Calls(map, functools.partial(os.mkdir), [str(trace)]),
        "deep inside": {"a": [(1, Calls(os.mkdir, str(trace)))]},
        "a key": {Calls(os.mkdir, str(trace)): 1},
        "a dictionary of a class": collections.OrderedDict(a=Calls(os.mkdir, str(trace))),
    }


KINDS = sorted(ways(Path("x")))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A converted checkpoint, as somebody might publish it."""
    out = tmp_path_factory.mktemp("published") / "mg"
    source = MODELS / "student"
    convert.to_megatron(convert.plan_to_megatron(source), source, out)
    return out


@pytest.fixture
def published(model, tmp_path):
    return shutil.copytree(model, tmp_path / "mg")


@pytest.fixture
def trace(tmp_path):
    """What must not be there afterwards."""
    path = tmp_path / "trace"
    yield path
    assert not path.exists()


def read(data):
    return unpickling.metadata(io.BytesIO(data), "it")


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_call_nothing(trace, kind):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        try:
            data = pickle.dumps(ways(trace)[kind], protocol)
        except (TypeError, AttributeError):
            continue
        with pytest.raises(
            unpickling.Untrusted, match=r"it asks for [\w.]+, which no checkpoint needs.*do not trust it"
        ):
            read(data)


@pytest.mark.parametrize(
    "name",
    [
        "torch.distributed.checkpoint.metadata Metadata.__init__",  # a dotted name leads to all that a class can reach
        "torch.distributed.checkpoint.metadata os",
        "torch load",
        "torch.serialization load",
        "torch.distributed.checkpoint.filesystem FileSystemReader",
        "builtins getattr",
        "torch.distributed.checkpoint planner.SavePlan",
        "copyreg _reconstructor",
    ],
)
def test_only_listed_names_are_looked_up(name):
    module, _, attribute = name.partition(" ")
    for data in (
        f"c{module}\n{attribute}\n.".encode(),
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(attribute)])
        + attribute.encode()
        + b"\x93.",
    ):
        assert list(pickletools.genops(data))
        with pytest.raises(unpickling.Untrusted, match=name.replace(" ", r"\.")):
            read(data)


def test_what_is_no_list_of_tensors_is_damaged(trace):
    for data in (
        b"",
        b"\x80\x04",
        b"garbage",
        b"\x00" * 64,
        pickle.dumps({}),
        pickle.dumps([1]),
        b"\x80\x04\x95" + b"\xff" * 8,
    ):
        with pytest.raises(ValueError, match="it is damaged or cut short"):
            read(data)
    with pytest.raises(unpickling.Untrusted):
        read(b"\x80\x04\x8c\x01x\x94Q.")  # an object that the reader is asked to know


@pytest.mark.parametrize("kind", ["os.mkdir", "a partial", "deep inside"])
def test_inspect_check_and_teachers_refuse_such_metadata(published, trace, kind, capsys):
    (published / ".metadata").write_bytes(pickle.dumps(ways(trace)[kind]))
    assert main(["inspect", str(published)]) == 1
    assert "which no checkpoint needs" in capsys.readouterr().err
    for setting in (f"student.model={published}", f"teachers.0.model={published}"):
        assert_user_error(here("check", CONFIG, setting), ".metadata asks for", "do not trust it")
    with pytest.raises(ValueError, match="do not trust it"):
        TorchDistDir(published)


@pytest.mark.parametrize("elsewhere", ["../secret", "/etc/passwd", "..", "", "sub/__0_0.distcp", 7, None, ["a"]])
def test_metadata_name_files_of_their_directory_only(tmp_path, elsewhere):
    write(tmp_path / "c", [Region("a", (4,), (0,), (4,))], lambda _: torch.ones(4), torch.float32)
    path = tmp_path / "c/.metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = elsewhere
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"names the file .*do not trust it"):
        TorchDistDir(tmp_path / "c")


def test_metadata_of_other_versions_of_megatron_are_read(tmp_path):
    write(tmp_path / "c", [Region("a", (4,), (0,), (4,))], lambda _: torch.arange(4.0), torch.float32)
    path, theirs = tmp_path / "c/.metadata", "megatron.core.dist_checkpointing.strategies.torch"
    metadata = pickle.loads(path.read_bytes())
    metadata.mcore_data = {"a": {"nd_reformulated_orig_global_shape": (2, 2)}}
    data = pickle.dumps(metadata, 2)
    for ours, name in (("metadata", "Metadata"), ("planner", "SavePlan")):
        data = data.replace(
            f"torch.distributed.checkpoint.{ours}\n{name}\n".encode(), f"{theirs}\nMCore{name}\n".encode()
        )
    assert f"{theirs}\nMCoreMetadata".encode() in data
    path.write_bytes(data)
    assert TorchDistDir(tmp_path / "c").read(Region("a", (4,), (0,), (4,))).tolist() == [0, 1, 2, 3]
    path.write_bytes(data.replace(b"MCoreMetadata", b"MCoreSavePlanner"))
    with pytest.raises(unpickling.Untrusted, match="MCoreSavePlanner"):
        TorchDistDir(tmp_path / "c")


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_containers_call_nothing(trace, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # torch's way to load everything
    for number, is_zip in enumerate((True, False)):
        file = tmp_path / f"{number}.pt"
        try:
            torch.save(ways(trace)[kind], file, _use_new_zipfile_serialization=is_zip)
        except (TypeError, AttributeError):
            continue
        with pytest.raises(ValueError, match="do not trust it"):
            unpickling.container(str(file), file)


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_layers_call_nothing(trace, kind):
    data = bytearray(pickle.dumps(ways(trace)[kind]))
    with pytest.raises(unpickling.Untrusted):
        unpickling.check_fp8_state(torch.frombuffer(data, dtype=torch.uint8), "it")
    inside = io.BytesIO()
    torch.save(ways(trace)[kind], inside)
    with pytest.raises(unpickling.Untrusted):
        unpickling.check_fp8_state(inside, "it")
    storage = bytearray(pickle.dumps({"scale": Calls(torch.storage._load_from_bytes, inside.getvalue())}))
    with pytest.raises(unpickling.Untrusted):  # a pickle within torch's container within a pickle
        unpickling.check_fp8_state(torch.frombuffer(storage, dtype=torch.uint8), "it")


def test_states_of_layers_as_they_are_pass():
    state = {"scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(4, 3), "extra_fp8_variables": {"num_gemms": 1}}
    unpickling.check_fp8_state(torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8), "it")
    unpickling.check_fp8_state(torch.empty(0, dtype=torch.uint8), "it")
    unpickling.check_fp8_state(None, "it")


TENSOR_LOADERS = (b"ctorch.storage\n_load_from_bytes\n", b"cmegatron.core.safe_globals\nsafe_load_from_bytes\n")
"""The function that a pickled tensor names: torch's, and what newer versions of megatron-core put in its place."""


@pytest.mark.parametrize("loader", TENSOR_LOADERS)
def test_states_of_layers_of_either_stack_pass(loader):
    data = pickle.dumps({"scale_fwd": torch.ones(3)}, protocol=2)
    assert sum(known in data for known in TENSOR_LOADERS) == 1
    for known in TENSOR_LOADERS:
        data = data.replace(known, loader)
    unpickling.check_fp8_state(torch.frombuffer(bytearray(data), dtype=torch.uint8), "it")
