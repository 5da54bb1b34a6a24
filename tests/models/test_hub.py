"""Models by name: against a hub on this machine, with the installed huggingface_hub."""

import json
import os
import re
import subprocess
import sys
import time

import hub_server
import pytest
import tiny

from megatron_opd.config import ServersConfig
from megatron_opd.config.model_names import may_be_name
from megatron_opd.models import hub

NAME = "org/tiny"
WEIGHTS = bytes(range(256)) * 4096
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "README.md": b"not needed",
    "pytorch_model.bin": b"not needed",
    "onnx/model.safetensors": b"not needed",
    "consolidated.safetensors": b"not needed",
}


@pytest.fixture
def served(tmp_path, monkeypatch):
    with hub_server.running() as found:
        hub_server.use(monkeypatch, found, tmp_path / "home")
        yield found


def refused(text, *needed, need="weights"):
    with pytest.raises(ValueError, match=re.escape(needed[0])) as caught:
        hub.directory(text, need, say=lambda _: None)
    missing = [part for part in needed if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    return str(caught.value)


def test_a_name_becomes_a_directory_with_what_is_read_of_it(served, tmp_path):
    commit = served.add(NAME, FILES)
    said = []
    found = hub.directory(NAME, say=said.append)
    assert sorted(os.listdir(found)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert hub.origin(found) == f"{NAME}@{commit}" == hub.pinned(NAME, found)
    assert said == [f"downloading 3 files of {NAME}@{commit[:12]} (1.05 MB) into {tmp_path / 'home/hub'}"]
    served.asked.clear()
    assert hub.directory(NAME, say=said.append) == found
    assert len(said) == 1
    assert not served.downloads()


@pytest.mark.parametrize(("need", "files"), [("config", {"config.json"}), ("texts", {"config.json", "tokenizer.json"})])
def test_only_what_is_needed_is_downloaded(served, need, files):
    served.add(NAME, FILES)
    found = hub.directory(NAME, need, say=lambda _: None)
    assert set(os.listdir(found)) == files
    assert hub.lacks_weights(found)


def test_a_part_of_the_weights_is_no_weights(served):
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    served.add(NAME, {**files, "a.safetensors": b"a", "b.safetensors": b"b"})
    found = hub.directory(NAME, say=lambda _: None)
    assert not hub.lacks_weights(found)
    os.unlink(os.path.join(found, "b.safetensors"))
    assert hub.lacks_weights(found)


def test_a_local_directory_of_that_name_wins(served, tmp_path, monkeypatch):
    served.add(NAME, FILES)
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    assert hub.directory(NAME) == NAME
    assert not served.asked
    assert hub.pinned(NAME, NAME) == NAME


@pytest.mark.parametrize("text", ["/nowhere/model", "./model", "model", "a/b/c", "~/model", "org/na me", "a/b:c", ""])
def test_what_has_not_the_form_of_a_name_is_left_alone(served, text):
    assert not may_be_name(text)
    assert hub.directory(text) == text
    assert not served.asked


def test_branches_tags_and_commits(served):
    first = served.add(NAME, FILES)
    repo = served.repos[NAME]
    repo.refs["v1.0"] = first
    repo.refs["refs/pr/3"] = second = repo.commit({**FILES, "config.json": b'{"second": 2}'})
    for revision, commit in {"": second, "@v1.0": first, "@refs/pr/3": second, f"@{first}": first}.items():
        assert hub.origin(hub.directory(NAME + revision, say=lambda _: None)) == f"{NAME}@{commit}"
    assert len(served.downloads("model.safetensors")) == 1, "the same file of another commit is kept once"


def test_a_branch_that_moves_is_another_directory(served):
    first = served.add(NAME, FILES)
    before = hub.directory(NAME, say=lambda _: None)
    second = served.repos[NAME].commit({**FILES, "config.json": b'{"second": 2}'})
    after = hub.directory(NAME, say=lambda _: None)
    assert [hub.origin(before), hub.origin(after)] == [f"{NAME}@{first}", f"{NAME}@{second}"]


def test_offline_from_the_cache(served, tmp_path, monkeypatch):
    served.add(NAME, FILES)
    hub_server.use(monkeypatch, served, tmp_path / "home", offline=True)
    refused(NAME, "HF_HUB_OFFLINE is set", str(tmp_path / "home/hub"), "has no org/tiny@main")
    hub_server.use(monkeypatch, served, tmp_path / "home")
    hub.directory(NAME, "texts", say=lambda _: None)
    hub_server.use(monkeypatch, served, tmp_path / "home", offline=True)
    refused(NAME, "only a part of", "HF_HUB_OFFLINE")
    hub_server.use(monkeypatch, served, tmp_path / "home")
    found = hub.directory(NAME, say=lambda _: None)
    hub_server.use(monkeypatch, served, tmp_path / "home", offline=True)
    served.asked.clear()
    assert hub.directory(NAME) == found
    assert not served.asked


def test_a_hub_that_does_not_answer(served, tmp_path, monkeypatch):
    served.add(NAME, FILES)
    found = hub.directory(NAME, say=lambda _: None)
    gone = hub_server.Hub(url="http://127.0.0.1:9")  # nothing listens at the discard port
    hub_server.use(monkeypatch, gone, tmp_path / "home")
    assert hub.directory(NAME) == found, "the cache has it"
    refused("org/other", "no answer came from http://127.0.0.1:9", "has no org/other@main", "name a directory")


def test_a_hub_that_is_out_of_order(served):
    served.fails_with = 500
    refused(NAME, "no answer came from", "500", "has no org/tiny@main")


def test_the_token_of_the_environment_is_sent(served, monkeypatch):
    served.add(NAME, FILES, token="hf_secret")
    said = refused(NAME, "the hub has none of that name, or it is private", "set HF_TOKEN to a token")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(NAME, "replace the token (HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.directory(NAME, say=lambda _: None)
    assert {told for *_, told, _ in served.asked[-5:]} == {"Bearer hf_secret"}
    assert "hf_" not in said.replace("HF_", "")


def test_a_gated_model_says_where_its_terms_are(served):
    served.add(NAME, FILES, is_gated=True)
    refused(NAME, f"is gated: accept its terms at {served.url}/{NAME}", "HF_TOKEN")


def test_what_is_not_there(served, tmp_path, monkeypatch):
    served.add(NAME, FILES)
    refused(f"{NAME}@v9", "has no branch, tag or commit 'v9'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/SmolLM2-135M").mkdir(parents=True)
    refused("models/SmolLM-135M", "the hub has none of that name", "did you mean models/SmolLM2-135M?")


def test_repositories_that_are_no_models(served):
    served.add("org/old", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    refused("org/old", "has no safetensors", "it has pytorch_model.bin")
    served.add("org/packed", {"config.json": b"{}", "m.Q4_0.gguf": b"x"})
    refused("org/packed", "name a GGUF file so: org/packed:m.Q4_0.gguf")
    served.add("org/data", {"train.parquet": b"x", "x.safetensors": b"x"})
    refused("org/data", "no config.json")
    refused("org/packed:other.gguf", "has no file other.gguf")


def test_a_full_disk(served, monkeypatch):
    served.add(NAME, FILES)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    refused(NAME, "needs 1.05 MB in", "HF_HOME")
    assert not served.downloads()


def test_a_download_that_is_cut_goes_on(served, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # it keeps whole chunks, of 10 MB otherwise
    served.add(NAME, FILES)
    served.cut["model.safetensors"] = 300_000
    found = hub.directory(NAME, say=lambda _: None)
    assert (hub.Path(found) / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [range_ for method, path, _, range_ in served.asked if method == "GET" and path.endswith("el.safetensors")]
    assert ranges == ["", f"bytes={4 << 16}-"]


_RANK = """
import sys
from megatron_opd.config import ServersConfig
from megatron_opd.config.model_names import may_be_name
from megatron_opd.models import hub
print(hub.directory(sys.argv[1], say=lambda _: None))
"""


def test_processes_that_ask_at_the_same_time_download_once(tmp_path):
    with hub_server.running() as served:
        commit = served.add(NAME, FILES)
        environment = {**os.environ, **hub_server.environment(served, tmp_path / "home")}
        command = [sys.executable, "-c", _RANK, NAME]
        ranks = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        found = {rank.communicate(timeout=600)[0].strip() for rank in ranks}
        assert [hub.origin(path) for path in found] == [f"{NAME}@{commit}"]
        assert len(served.downloads("model.safetensors")) == 1


def test_a_process_that_was_killed_while_it_downloaded(tmp_path):
    """The next one takes what is there; a lock does not outlive its process."""
    with hub_server.running() as served:
        served.add(NAME, FILES)
        environment = {**os.environ, **hub_server.environment(served, tmp_path / "home")}
        command = [sys.executable, "-c", _RANK, NAME]
        first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        while not served.downloads():
            assert first.poll() is None
            time.sleep(0.01)
        first.kill()
        first.wait(timeout=600)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        found = done.stdout.strip()
        assert (hub.Path(found) / "model.safetensors").read_bytes() == WEIGHTS, done.stderr


def test_what_a_run_reads_of_each_model():
    base = {"name": "t", "model": "org/t"}
    apart = {**base, "backend": "sglang", "carrier": "topk"}
    urls = {"servers": ServersConfig(urls=["http://node7:30000"])}
    for teacher, starts, asks, need in (
        (base, False, False, "weights"),
        ({**apart, **urls}, True, False, "texts"),
        ({**apart, **urls}, True, True, "weights"),
        ({**apart, **urls, "carrier": "hidden"}, True, False, "weights"),
        (apart, True, False, "weights"),
        (apart, False, False, "texts"),
    ):
        made = tiny.config("org/s", [teacher])
        found = hub.needs(made.student, made.teachers, starts_servers=starts, asks_teachers=asks)
        assert found == {"org/s": "weights", "org/t": need}
    itself = tiny.config("org/s", [{**apart, **urls, "model": "org/s"}])
    found = hub.needs(itself.student, itself.teachers, starts_servers=True, asks_teachers=False)
    assert found == {"org/s": "weights"}


def test_a_config_with_directories_in_place_of_names():
    written = tiny.config("org/s", [{"name": "a", "model": "org/t"}, {"name": "b", "model": "models/b"}])
    assert written.model_settings == {
        "org/s": "student.model",
        "org/t": "teachers.0.model",
        "models/b": "teachers.1.model",
    }
    found = written.with_models({"org/s": "/cache/s", "org/t": "/cache/t"})
    assert [found.student.model, *(t.model for t in found.teachers)] == ["/cache/s", "/cache/t", "models/b"]
    assert written.student.model == "org/s"
