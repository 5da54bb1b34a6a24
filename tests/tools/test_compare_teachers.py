"""The comparison of two real teachers: cells that are finished are kept, and the table shows those that are not."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import compare_teachers  # noqa: E402
from teacher_comparison import cells, runs  # noqa: E402

from megatron_opd.config.file import load  # noqa: E402

METRICS = {f"{kind}/{name}": 0.25 for kind in ("kl", "agreement", "forced_agreement") for name in cells.TEACHERS}


def line(name, **settings):
    metrics = {source: {**METRICS, "nll": 2.5} for source in cells.SOURCES}
    spent = {"train": 12.0, "measure": 3.0}
    return {"cell": name, "settings": settings, "overrides": [], "core_seconds": spent, "metrics": metrics}


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the tool on models that are there only by name; returns (exit code, names of the cells that ran)."""
    ran = []
    for name in ("model", "student"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.setattr(compare_teachers, "make_specialist", lambda setting: ran.append("make specialist"))

    def finished(cell, setting):
        ran.append(cell.name)
        return line(cell.name, **setting.told())

    monkeypatch.setattr(compare_teachers, "finished", finished)

    def run(*arguments):
        ran.clear()
        where = ["--model", tmp_path / "model", "--student", tmp_path / "student", "--dir", tmp_path / "runs"]
        return compare_teachers.main([str(one) for one in (*where, *arguments)]), list(ran)

    return run


def test_a_finished_cell_is_not_run_again_unless_settings_differ(command, tmp_path):
    assert command("--cells", "routed", "before") == (0, ["make specialist", "before", "routed"])
    assert command("--cells", "routed", "logits") == (0, ["make specialist", "logits"])
    assert command("--cells", "routed", "logits") == (0, [])
    assert command("--cells", "routed", "--steps", 9)[1] == ["make specialist", "routed"]
    path = tmp_path / "runs/two_teachers.jsonl"
    assert [json.loads(text)["cell"] for text in path.read_text().splitlines()] == [
        "before",
        "routed",
        "logits",
        "routed",
    ]
    assert (tmp_path / "runs/two_teachers.png").stat().st_size > 1000


def test_a_line_that_was_cut_off_is_run_again(command, tmp_path):
    command("--cells", "before", "routed")
    path = tmp_path / "runs/two_teachers.jsonl"
    path.write_text(path.read_text()[:-20])
    assert command("--cells", "before", "routed") == (0, ["make specialist", "routed"])
    assert command("--cells", "before", "routed") == (0, [])


def test_the_table_says_what_was_not_run(command, capsys):
    command("--cells", "before")
    rows = [text for text in capsys.readouterr().out.splitlines() if text.startswith("|")]
    (before,) = [row for row in rows if "student before" in row]
    assert "0.250" in before
    assert "25.0" in before
    assert "2.500" in before
    (routed,) = [row for row in rows if "routed by source" in row]
    assert routed.count("not run") == len(METRICS) + 1


def test_a_model_that_is_not_there_is_said(tmp_path, capsys):
    assert compare_teachers.main(["--model", str(tmp_path / "none"), "--dir", str(tmp_path)]) == 1
    assert "holds no model" in capsys.readouterr().err


@pytest.mark.parametrize("cell", [cell for cell in cells.CELLS if cell.settings], ids=lambda cell: cell.name)
def test_the_settings_of_a_cell_are_settings(cell):
    config = load(ROOT / "examples/llm/two_teachers.yaml", [*cell.settings, "train.eval_every=0"])
    weights = [[config.teacher_weights(source)[i] for source in cells.SOURCES] for i in range(2)]
    expected = {"only_original": [[1, 1], [0, 0]], "only_specialist": [[0, 0], [1, 1]], "routed": [[1, 0], [0, 1]]}
    assert weights == expected.get(cell.name, [[0.5, 0.5]] * 2)
    assert [source.name for source in config.data.eval] == list(cells.SOURCES)


def test_the_specialist_learns_from_the_second_source():
    config = load(runs._SPECIALIST, [])
    assert [source.name for source in config.data.train] == [cells.SOURCES[1]]
    assert config.teachers == []
    assert config.lora.rank > 0
