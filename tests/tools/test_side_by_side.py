"""The answers of several models to the same prompts, printed and in a file."""

import shutil

import pytest
import side_by_side
from program import MODELS, ROOT

from megatron_opd.core.types import Prompt


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run whose student became the teacher "carry"."""
    monkeypatch.chdir(ROOT)
    shutil.copytree(MODELS / "teacher_carry", tmp_path / "hf")
    return tmp_path


def test_every_model_answers_the_same_prompts(run_dir, capsys):
    given = ["examples/quickstart.yaml", f"run.dir={run_dir}", "--prompts", "2"]
    assert side_by_side.main(given) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("carry", "compare", "student before", "student after"))
    text = (run_dir / "answers.md").read_text()
    add, subtract = text.split("## ")[1:]
    assert add.startswith("add, row 1")
    assert subtract.startswith("subtract, row 1")
    for part in (add, subtract):
        said = dict(zip(part.split("**")[1::2], part.split("**")[2::2], strict=True))
        assert said["carry"].strip() == said["student after"].strip() != said["compare"].strip()


def test_a_run_without_an_export_has_no_student_after(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert side_by_side.main(["examples/quickstart.yaml", f"run.dir={tmp_path}/none"]) == 1
    assert "the run has not ended" in capsys.readouterr().err


def test_sources_take_turns():
    sizes = {"a": 3, "b": 1, "c": 2}
    sources = [[Prompt(source=s, index=i, text="", token_ids=(1,)) for i in range(n)] for s, n in sizes.items()]
    taken = side_by_side.in_turn(sources, 5)
    assert [(prompt.source, prompt.index) for prompt in taken] == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1)]
    assert side_by_side.in_turn([], 3) == []
