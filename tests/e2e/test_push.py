"""`megatron-opd push`: the card that it makes of a run, and what arrives at a hub on this machine."""

import json
import os
import shutil
from importlib.metadata import version

import hub_server
import pytest
import yaml
from program import MODELS, assert_user_error, here

COMMIT = "1234567890abcdef1234567890abcdef12345678"
CONFIG = {
    "method": "gkd",
    "student": {"model": "org/base", "dtype": "fp32"},
    "teachers": [{"name": "carry", "model": "org/teacher@v1"}, {"name": "own", "model": "/secret/place/teacher_own"}],
    "optim": {"lr": 0.001},
    "train": {"steps": 40},
    "data": {"train": [{"name": "add", "path": "hf:org/sums"}], "eval": [{"name": "add", "path": "/secret/add.jsonl"}]},
}


@pytest.fixture
def finished(tmp_path):
    """The directory of a run that is done, without the run."""
    run = tmp_path / "mine"
    checkpoint = run / "checkpoints/step_00000040"
    checkpoint.mkdir(parents=True)
    models = {"student.model (config and tokenizer)": f"org/base@{COMMIT}", "teacher 'own'": "aa00"}
    (checkpoint / "loop.json").write_text(json.dumps({"step": 40, "conditions": {"models": models}}))
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    rows = [{"step": 0, "eval/accuracy/add": 0.06, "eval/accuracy/all": 0.06, "eval/kl/carry": 2.0}]
    rows += [{"step": 40, "eval/accuracy/add": 0.95, "eval/accuracy/all": 0.95, "eval/kl/carry": 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(MODELS / "student", run / "hf")
    (run / "hf/README.md").write_text("the card of the base model")
    os.utime(run / "hf/config.json")
    return run


@pytest.fixture
def served(tmp_path, monkeypatch):
    with hub_server.running() as found:
        hub_server.use(monkeypatch, found, tmp_path / "home", token="hf_mine")
        yield found


def push(run, *options, to="me/mine"):
    return here("push", str(run), "--to", to, *options)


def test_a_dry_run_shows_card_and_files_and_asks_nobody(finished, served):
    done = push(finished, "--dry-run", "--private", "--license", "apache-2.0")
    assert done.returncode == 0, done.stderr
    assert not served.asked
    front = yaml.safe_load(done.stdout.split("---")[1])
    assert front == {
        "license": "apache-2.0",
        "base_model": "org/base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["on-policy-distillation", "megatron-opd", "gkd"],
        "datasets": ["org/sums"],
    }
    for line in (
        f"`org/base@{COMMIT}` learned from carry (`org/teacher@v1`) and own (`teacher_own`) by the method `gkd`",
        'AutoModelForCausalLM.from_pretrained("me/mine"',
        "| add | 6.0 | - | 95.0 | +89.0 |",
        "| `optim.lr` | 0.001 |",
        f"Made with megatron-opd {version('megatron-opd')}",
        "would upload to me/mine (private):",
    ):
        assert line in done.stdout
    listed = {line.split()[2] for line in done.stdout.splitlines() if line[:2] == "  " and "B  " in line}
    assert listed == {path.name for path in (finished / "hf").iterdir()}
    assert "secret" not in done.stdout, "places on this disk are nobody's business"


def test_without_a_licence_the_card_has_none_and_it_is_said(finished):
    done = push(finished, "--dry-run")
    assert "license" not in done.stdout.split("---")[1]
    assert "the card names no licence; --license does" in done.stdout


def test_the_export_arrives_with_its_card(finished, served):
    done = push(finished, "--private")
    assert done.returncode == 0, done.stderr
    repo = served.repos["me/mine"]
    assert repo.is_private
    files = repo.commits[repo.refs["main"]]
    own = hub_server.files_of(finished / "hf")
    assert files.keys() == own.keys()
    assert {name for name in own if files[name] != own[name]} == {"README.md"}
    assert b"learned from carry" in files["README.md"]
    assert len(repo.commits) == 2, "one commit behind the empty one"
    assert f"done: {served.url}/me/mine/commit/{repo.refs['main']}" in done.stdout
    assert {told for _, path, told, _ in served.asked if path.startswith(("/api/repos", "/api/models"))} == {
        "Bearer hf_mine"
    }


def test_a_card_of_ones_own_and_a_second_time(finished, served, tmp_path):
    (tmp_path / "card.md").write_text("mine alone")
    for _ in range(2):
        assert push(finished, "--card", str(tmp_path / "card.md")).returncode == 0
    repo = served.repos["me/mine"]
    assert repo.commits[repo.refs["main"]]["README.md"] == b"mine alone"
    assert_user_error(push(finished, "--private"), "me/mine is there already, and public")
    assert_user_error(push(finished, "--card", "x.md", "--license", "mit"), "put it into that file")


def test_an_unfinished_export_is_refused_by_name(finished, served):
    newer = finished / "checkpoints/step_00000050"
    shutil.copytree(finished / "checkpoints/step_00000040", newer)
    now = (finished / "hf/config.json").stat().st_mtime
    os.utime(newer / "loop.json", (now + 60, now + 60))
    assert_user_error(push(finished), f"{finished}/hf is older than {newer}")
    shutil.rmtree(newer)
    (finished / "hf/model.safetensors").unlink()
    assert_user_error(push(finished), f"{finished}/hf is not whole")
    (finished / "hf").rename(finished / "hf.tmp")
    assert_user_error(push(finished), f"{finished}/hf.tmp was cut off", "megatron-opd train")
    shutil.rmtree(finished / "hf.tmp")
    assert_user_error(push(finished), f"{finished}/hf is not there")
    assert not served.asked


@pytest.mark.parametrize("to", ["mine", "me/mine@v1", "me/mine:x.gguf", "https://hub/me/mine", ""])
def test_what_is_no_name_of_a_repository(finished, to):
    assert_user_error(push(finished, "--dry-run", to=to), "must be Org/Name")


def test_a_hub_that_lets_nobody_write_or_does_not_answer(finished, served, tmp_path, monkeypatch):
    served.fails_with = 403
    assert_user_error(push(finished), f"{served.url} does not let this account write to me/mine", "HF_TOKEN")
    hub_server.use(monkeypatch, hub_server.Hub(url="http://127.0.0.1:9"), tmp_path / "home")
    assert_user_error(push(finished), "the upload to http://127.0.0.1:9/me/mine failed")
    hub_server.use(monkeypatch, served, tmp_path / "home", offline=True)
    assert_user_error(push(finished), "HF_HUB_OFFLINE is set, so nothing can be uploaded")
