"""One NCCL on both sides: how the servers' is found, what is refused, and what a failed group says."""

import asyncio
import sys
from pathlib import Path

import pytest
import torch

from megatron_opd.config import ServersConfig
from megatron_opd.config.file import load
from megatron_opd.sglang import nccl, serve
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.errors import Down, Refused, Unfit
from megatron_opd.sglang.nccl import Nccl
from megatron_opd.sglang.weights import broadcast
from megatron_opd.sglang.weights.broadcast import Broadcast
from megatron_opd.sglang.weights.buckets import Bucket

ROOT = Path(__file__).resolve().parents[2]
OURS = Nccl("2.13.0", "2.29.7")
MISMATCH = (
    "NCCL error in: ProcessGroupNCCL.cpp, invalid usage, NCCL version 2.29.7\nncclInvalidUsage: usually reflects\n"
    "Last error:\nMismatched NCCL version detected : rank 1 version 23007 rank 0 version 22907"
)


@pytest.fixture
def python(tmp_path):
    """python(text) -> the interpreter of an environment whose Python says that, whatever it is asked."""

    def make(text):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("echo answer 2.14.1+cu130 2.30.7", Nccl("2.14.1+cu130", "2.30.7")),
        ("echo a warning; echo answer 2.13.0+cpu none", Nccl("2.13.0+cpu", "")),
    ],
)
def test_what_an_environment_says(python, text, found):
    assert nccl.of(python(text)) == found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("echo no module named torch >&2; exit 1", "does not say which NCCL its torch has: no module named torch"),
        ("echo answer", "does not say which NCCL its torch has: no answer"),
        ("exec sleep 600", "has not imported torch in 0.1 s"),
    ],
)
def test_an_environment_that_says_nothing(python, text, why):
    with pytest.raises(ValueError, match=why):
        nccl.of(python(text), timeout_s=0.1 if "sleep" in text else 600)
    with pytest.raises(ValueError, match="No such file"):
        nccl.of("/no/such/python")


def test_this_environment_says_of_itself_what_a_process_in_it_finds():
    assert nccl.of(sys.executable) == nccl.own()
    assert nccl.own().torch == torch.__version__


@pytest.mark.sglang
def test_the_real_environment_of_the_servers_says_its_own():
    interpreter = ROOT / ".venv-sglang/bin/python"
    if not interpreter.exists():
        pytest.skip("needs `make sglang`")
    found = nccl.of(interpreter)
    assert found.torch
    assert bool(found.version) == ("+cpu" not in found.torch)


def test_the_same_on_both_sides_is_no_problem(python):
    said = []
    nccl.compare(OURS, python("echo answer 2.14.1 2.29.7"), setting="rollout.servers.python", say=said.append)
    assert said == []


@pytest.mark.parametrize(
    ("answer", "theirs"),
    [("2.14.1 2.30.7", r"NCCL 2\.30\.7 \(torch 2\.14\.1\)"), ("2.13.0+cpu none", r"no NCCL \(torch 2\.13\.0\+cpu\)")],
)
def test_another_one_is_an_error_that_names_both_and_the_fix(python, answer, theirs):
    words = r"the trainer has NCCL 2\.29\.7 \(torch 2\.13\.0\) and the servers of rollout\.servers\.python \(.*\) have "
    with pytest.raises(ValueError, match=words + theirs) as caught:
        nccl.compare(OURS, python(f"echo answer {answer}"), setting="rollout.servers.python", say=print)
    for fix in ("torch 2.14.1", "nvidia-nccl-cu13", "rollout.sync: disk"):
        assert fix in str(caught.value)


def test_an_unknown_one_is_said_and_tried(python):
    said = []
    nccl.compare(OURS, python("exit 1"), setting="rollout.servers.python", say=said.append)
    assert len(said) == 1
    assert "ours is NCCL 2.29.7 (torch 2.13.0), the servers' is unknown" in said[0]


@pytest.mark.parametrize(
    ("overrides", "is_asked"),
    [
        ([], True),
        (["rollout.sync=disk"], False),
        (["rollout.sync=tensor"], False),
        (["rollout.servers.urls=[http://a:1]"], False),
    ],
)
def test_it_is_asked_before_servers_of_a_broadcast_start(tmp_path, monkeypatch, overrides, is_asked):
    """And nobody is asked where there is no GPU, or no server of ours."""
    asked = []

    def compare(mine, python, **_):
        asked.append(python)
        raise ValueError("!")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(nccl, "compare", compare)
    monkeypatch.setattr(serve.process, "start", lambda *_, **__: [])
    config = load("examples/quickstart.yaml", ["rollout.engine=sglang", f"run.dir={tmp_path}", *overrides])
    with serve.running(config, say=print):
        assert asked == []
    monkeypatch.setattr(serve.torch.cuda, "is_available", lambda: True)
    if is_asked:
        with pytest.raises(ValueError, match="!"):
            serve.running(config, say=print).__enter__()
    else:
        with serve.running(config, say=print):
            pass
    assert asked == [config.rollout.servers.python] * is_asked


def test_the_switches_are_those_of_the_servers_unless_somebody_has_set_them():
    environment = {"NCCL_NVLS_ENABLE": "1"}
    nccl.settle(environment)
    assert environment == {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "1"}


@pytest.mark.sglang
def test_the_servers_switch_off_what_we_do():
    """SGLang sets them in one place, where nobody else has: its text, since a server without a GPU has no NCCL."""
    (engine,) = ROOT.glob(".venv-sglang/lib/python3*/site-packages/sglang/srt/entrypoints/engine.py") or [None]
    if engine is None:
        pytest.skip("needs `make sglang`")
    text = engine.read_text()
    for name in nccl.SWITCHES:
        assert f'"{name}" not in os.environ' in text


class Member(Client):
    """A server whose part of the group fails with some words."""

    def __init__(self, words):
        super().__init__("http://server", ServersConfig(), vocab_size=1, context=1)
        self.words, self.asked = words, []

    async def _request(self, method, path, *_, **__):
        return {"tp_size": 1}

    async def order(self, path, body, timeout_s=None):
        self.asked.append(path)
        if path == "/update_weights_from_distributed":
            raise Refused(f"{self.url}{path}: Failed to receive weights: {self.words}")
        return {"success": True}

    async def post(self, path, body, timeout_s=None):
        return {}


class Group:
    """This process's part of it."""

    backend, name, address, world_size = "nccl", "g", ("127.0.0.1", 1), 2

    def __init__(self, *_):
        pass

    async def join(self):
        pass

    async def broadcast(self, flat):
        await asyncio.sleep(3600)

    def let_go(self):
        pass

    drop = let_go


def test_a_group_of_different_ones_is_no_victims_failure(monkeypatch):
    """It ends the update at once, in words that name both, and no group is made again."""
    monkeypatch.setattr(broadcast, "BroadcastGroup", Group)
    bucket = Bucket(["w"], [torch.Size([1])], torch.zeros(1))
    member = Member(MISMATCH)
    with pytest.raises(Unfit, match=r"the group has 2\.29\.7 and 2\.30\.7: install the torch of the servers"):
        asyncio.run(Broadcast(600.0).send([member], bucket, "1"))
    assert member.asked.count("/update_weights_from_distributed") == 1
    victim = Member("connection reset by peer")
    failed = asyncio.run(Broadcast(600.0).send([victim], bucket, "1"))
    assert list(failed) == [victim]
    assert not isinstance(failed[victim], Unfit)
    assert victim.asked.count("/update_weights_from_distributed") == 3


def test_what_is_no_mismatch_is_not_explained():
    assert nccl.explain(["NCCL error: unhandled system error", str(Down("gone"))]) == ""
    assert "2.9.6 and 2.30.7" in nccl.explain(["", MISMATCH.replace("22907", "20906")])
