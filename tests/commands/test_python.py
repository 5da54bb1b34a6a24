"""Python's interface: docs/api.md as it is written, and what it says about errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import warm

import megatron_opd
from megatron_opd.config import examples
from megatron_opd.config.file import dump, to_dict

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/api.md").read_text()
ROWS = [
    {"step": 0, "eval/accuracy/all": 0.25},
    {"step": 1, "loss": 2.0, "time_s": 1.0},
    {"step": 2, "loss": 1.0, "eval/accuracy/all": 0.5},
    {"step": 2, "loss": 1.5},
]
ANSWERS = [
    {"step": 2, "source": "add", "prompt": "1+1=", "response": "2", "reward": 1.0},
    {"step": 2, "source": "add", "prompt": "1+2=", "response": "2", "reward": 0.0},
]


@pytest.mark.slow
def test_the_example_of_the_page_runs(tmp_path):
    """Twice: the second run continues the first one's directory, which has nothing left to do."""
    examples.write("gkd", tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for _ in range(2):
        done = warm.run(["-c", code], timeout=600, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        metrics, answers, accuracy = re.fullmatch(r"(.*?\n)( +step .*\n)(\S+)\n", done.stdout, re.DOTALL).groups()
        assert re.search(r"^4 +\d\.\d+ ", metrics, re.MULTILINE)
        assert "prompt" in answers
        assert 0 <= float(accuracy) <= 1


def test_the_page_has_every_public_name():
    public = {*megatron_opd.__all__} - {"Config", "RunTables", "__version__"}
    assert {name for name in public if f"| `{name}(" not in PAGE} == set()
    assert {*megatron_opd.__all__} <= {*dir(megatron_opd)}
    for name in megatron_opd.__all__:
        assert getattr(megatron_opd, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        megatron_opd.nothing  # noqa: B018


def test_the_import_is_light():
    heavy = "import sys, megatron_opd; sys.exit(bool({'torch', 'numpy', 'pydantic', 'pandas'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", heavy], check=True, timeout=120)


def test_overrides_are_values_or_texts(monkeypatch):
    monkeypatch.chdir(ROOT)
    values = {
        "run.dir": Path("runs") / "one: two",
        "train.steps": 7,
        "optim.lr": 1e-5,
        "rewards.thinking": ["<a>", "b: c"],
        "teachers.0.sources": {"max": 0.5, "min": 0},
        "train.eval_teachers": False,
    }
    config = megatron_opd.load_config("examples/gkd.yaml", values)
    assert (config.run.dir, config.train.steps, config.optim.lr) == ("runs/one: two", 7, 1e-5)
    assert (config.rewards.thinking, config.train.eval_teachers) == (["<a>", "b: c"], False)
    assert config.teachers[0].sources == {"max": 0.5, "min": 0}
    assert megatron_opd.load_config("examples/gkd.yaml", ["train.steps=7"]).train.steps == 7
    with pytest.raises(ValueError, match=r"train\.step"):
        megatron_opd.load_config("examples/gkd.yaml", {"train.step": 7})


@pytest.mark.parametrize("name", examples.names())
def test_a_config_is_what_its_text_says(name, tmp_path):
    """`train` hands it to ranks as a file."""
    config = megatron_opd.load_config(examples.folder() / f"{name}.yaml")
    (tmp_path / "config.yaml").write_text(dump(to_dict(config)))
    assert megatron_opd.load_config(tmp_path / "config.yaml") == config


def test_a_run_as_tables(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = megatron_opd.read_run(tmp_path)
    assert list(run.metrics.index) == [0, 1, 2]
    assert run.metrics.index.name == "step"
    assert run.metrics["loss"].dropna().to_dict() == {1: 2.0, 2: 1.5}  # a step that was done again counts once
    assert run.metrics["eval/accuracy/all"].dropna().to_dict() == {0: 0.25, 2: 0.5}
    assert (len(run.answers), run.config, run.dir) == (0, {}, tmp_path)
    lines = [json.dumps(row) for row in ANSWERS]
    (tmp_path / "completions.jsonl").write_text("\n".join([*lines, "no row", '{"step": 4, "sou']))
    assert megatron_opd.read_run(tmp_path).answers.to_dict("records") == ANSWERS


def test_what_cannot_be_read_or_trained(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no run directory"):
        megatron_opd.read_run(tmp_path / "nothing")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'megatron-opd\[pandas\]'"):
        megatron_opd.read_run(tmp_path)
    monkeypatch.chdir(ROOT)
    config = megatron_opd.load_config("examples/gkd.yaml", {"run.dir": str(tmp_path / "run")})
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="is a rank itself"):
        megatron_opd.train(config)


@pytest.mark.parametrize(("code", "error"), [(1, RuntimeError), (130, KeyboardInterrupt), (143, KeyboardInterrupt)])
def test_runs_that_do_not_end_well(tmp_path, monkeypatch, code, error):
    from megatron_opd.commands import first_look
    from megatron_opd.launch import local

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(first_look, "look", lambda *_, **__: None)
    monkeypatch.setattr(local, "launch", lambda *_, **__: code)
    config = megatron_opd.load_config("examples/gkd.yaml", {"run.dir": str(tmp_path / "run")})
    with pytest.raises(error):
        megatron_opd.train(config)
