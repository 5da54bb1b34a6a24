"""The program with models that a hub has: what each command downloads, and a run that goes on when a branch moved."""

import json

import hub_server
import pytest
from program import CONFIG, MODELS, SMALL, assert_user_error, here, opd, train

from megatron_opd.config import yaml_text
from megatron_opd.models import hub
from megatron_opd.models.convert import find_like

BY_NAME = [
    *("student.model=org/student", "teachers.0.model=org/teacher@v1", "teachers.1.model=org/other"),
    "train.eval_teachers=false",
]
SETTINGS = [*SMALL, *BY_NAME]


@pytest.fixture
def served(tmp_path, monkeypatch):
    with hub_server.running() as found:
        hub_server.use(monkeypatch, found, tmp_path / "home")
        for name, directory in (("student", "student"), ("teacher", "teacher_carry"), ("other", "teacher_compare")):
            commit = found.add(f"org/{name}", hub_server.files_of(MODELS / directory))
            found.repos[f"org/{name}"].refs["v1"] = commit
        yield found


def test_a_plan_needs_config_json_alone(served):
    done = here("check", CONFIG, "--plan", *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert {path.rpartition("/")[2] for path in served.downloads()} == {"config.json"}


def test_check_needs_no_weights(served, tmp_path):
    done = here("check", CONFIG, *SETTINGS, f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert not served.downloads("safetensors")
    commit = served.repos["org/student"].refs["main"]
    assert f"# student.model: org/student@{commit}; its weights are not here yet, `train` downloads them" in done.stdout
    assert "model: org/student\n" in done.stdout, "the settings are shown as they were written"
    assert "downloading" in done.stderr


def test_eval_downloads_the_weights_of_the_one_model_that_answers(served, tmp_path):
    settings = [*SETTINGS, f"run.dir={tmp_path / 'run'}", "data.eval.0.rows=2"]
    done = here("eval", CONFIG, "--model", "org/other", *settings)
    assert done.returncode == 0, done.stderr
    assert len(served.downloads("safetensors")) == 1
    assert "org/other" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "org/student"],
        ["verify", "org/student", str(MODELS / "student")],
        ["prune", "org/student", "OUT", "--drop", "1", "--dry-run"],
        ["convert", "hf-to-megatron", "--hf", "org/student@v1", "--out", "OUT", "--dry-run"],
    ],
    ids=lambda command: command[0],
)
def test_commands_on_models_take_names(served, tmp_path, command):
    done = here(*(str(tmp_path / "out") if word == "OUT" else word for word in command))
    assert done.returncode == 0, done.stderr
    assert len(served.downloads("safetensors")) == 1


def test_a_checkpoint_of_a_run_by_name_is_converted(served, tmp_path):
    """The config and tokenizer are those of the name in the run's config.yaml."""
    checkpoint = tmp_path / "run/checkpoints/step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / ".metadata").write_bytes(b"")
    (tmp_path / "run/config.yaml").write_text("student: {model: org/student}\n")
    assert hub.origin(find_like(checkpoint)).startswith("org/student@")
    assert not served.downloads("safetensors")
    (tmp_path / "run/config.yaml").write_text("student: {model: org/nothing}\n")
    with pytest.raises(ValueError, match=r"org/nothing as student\.model, which is not here.*with --like"):
        find_like(checkpoint)


def test_every_model_that_cannot_be_had_is_told_with_its_setting(served):
    done = here("check", CONFIG, *SETTINGS, "student.model=org/studnt", "teachers.1.model=org/other@v7")
    assert_user_error(
        done, "student.model: org/studnt is not a Hugging Face", "teachers.1.model: org/other@v7 is not a"
    )
    done = here("check", CONFIG, *SMALL, "student.model=examples/quickstart/models/studnet")
    assert_user_error(done, "did you mean examples/quickstart/models/student?")


@pytest.mark.slow
def test_a_run_by_names_and_the_same_when_a_branch_moved(served, tmp_path):
    """Also as the ranks of a launcher, and without the hub."""
    env = hub_server.environment(served, tmp_path / "home")
    run_dir = tmp_path / "run"
    settings = [*BY_NAME, "train.save_every=1"]
    first = train(run_dir, *settings, "train.steps=1", env=env)
    assert first.returncode == 0, first.stderr
    commit = served.repos["org/other"].refs["main"]
    assert f"teachers.1.model: org/other is the commit {commit}" in first.stderr
    written = yaml_text.load((run_dir / "config.yaml").read_text())
    assert [written["student"]["model"], written["teachers"][0]["model"]] == ["org/student", "org/teacher@v1"]
    models = json.loads((run_dir / "checkpoints/step_00000001/loop.json").read_text())["conditions"]["models"]
    assert models["teacher 'compare'"] == f"org/other@{commit}"

    files = hub_server.files_of(MODELS / "teacher_compare")
    moved = served.repos["org/other"].commit({**files, "generation_config.json": b"{}"})
    second = train(run_dir, *settings, "train.steps=2", "parallel.tensor=2", env=env)
    assert second.returncode == 0, second.stderr
    told = (run_dir / "train.log").read_text()
    assert f"changed since the checkpoint: teacher 'compare' org/other@{commit} -> org/other@{moved}" in told

    offline = opd("eval", CONFIG, *SETTINGS, f"run.dir={run_dir}", env={**env, "HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0, offline.stderr
