"""The bench beside a plain loop: both programs read the same tokens, and the figures are ratios of one round's."""

import json
import shutil
import sys
from pathlib import Path

import program
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import bench_vs_plain  # noqa: E402
import check_batches  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The quickstart's student with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "student"
    shutil.copytree(ROOT / "examples/quickstart/models/student", folder)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    (folder.parent / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{7 * i}+1"}) + "\n" for i in range(40))
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--generate-only", "--bf16"]])
def test_both_programs_read_the_same(model, tmp_path, options):
    sizes = ["--batch", "4", "--response", "3", "--steps", "1", "--rounds", "1", "--json", str(tmp_path / "a.json")]
    prompts = model.parent / "prompts.jsonl"
    done = program.tool("tools/bench_vs_plain.py", model, "--prompts", prompts, *sizes, *options)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert len({its[0]["prompt tokens"] for its in runs.values()}) == 1
    assert ("step" in runs["ours"][0]) == (not options)
    assert 0 <= runs["ours"][0]["mismatch/kl"] < 1e-6
    assert ("ours, rollout.dtype bf16" in runs) == bool(options)


def test_ratios_are_those_of_rounds():
    plain, ours = ([{"generate": x} for x in values] for values in ([1.0, 10.0, 2.0], [2.0, 5.0, 3.0]))
    assert bench_vs_plain._ratio(ours, plain, "generate") == "1.50"
    assert bench_vs_plain._ratio(ours, plain, "mismatch/kl") == ""


def test_batches_of_every_size_are_compared(model, capsys, monkeypatch):
    prompts = ["--prompts", str(model.parent / "prompts.jsonl")]
    asked = [str(model), *prompts, "--answers", "30", "--samples", "3", "--response", "5", "--batches", "1", "4", "64"]
    monkeypatch.setattr(check_batches.decoding, "MAX_ROWS", check_batches.decoding.MAX_ROWS)  # and put it back
    assert check_batches.main(asked) == 0
    out = capsys.readouterr().out
    assert "30 answers" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["1", "4", "64"]
    assert {row[2] for row in rows} == {"0"}
