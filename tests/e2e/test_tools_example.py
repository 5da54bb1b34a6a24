"""The example with tools at full length: what it promises, and that its one command makes its models and data."""

import json
import subprocess
import sys

import pytest
from program import ROOT, environment, opd

TOOLS = ROOT / "examples/tools"
NEAR = 0.1
"""Other processors and releases round differently, and then training ends in slightly other weights."""


def accuracies(run_dir):
    """Those of the evaluations, in order."""
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["eval/accuracy/products"] for row in metrics if "eval/accuracy/products" in row]


def skills():
    """What was measured when the committed models were made."""
    return json.loads((TOOLS / "skills.json").read_text())


def test_committed_skills_are_what_the_example_needs():
    teacher, student = skills()["teacher"], skills()["student"]
    assert teacher["greedy"]["right"] > 0.9
    assert max(student["greedy"]["right"], student["sampled"]["right"]) < 0.1
    assert student["sampled"]["calls"] > 0
    assert max(one["greedy_without_tool"]["right"] for one in (teacher, student)) < 0.1


def test_no_problem_of_training_is_evaluated():
    pairs = {}
    for split in ("train", "eval"):
        rows = [json.loads(line) for line in (TOOLS / f"data/{split}.jsonl").read_text().splitlines()]
        assert all(eval(row["prompt"]) == int(row["answer"]) for row in rows)
        pairs[split] = {frozenset(row["prompt"].split("*")) for row in rows}
    assert not pairs["train"] & pairs["eval"]


@pytest.mark.slow
def test_the_student_learns_to_call_the_calculator(tmp_path):
    done = opd("train", "examples/tools.yaml", f"run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    before, *_, after = accuracies(tmp_path)
    assert before < 0.1
    assert after >= 0.8


@pytest.mark.slow
def test_without_the_tool_it_learns_nothing_of_the_kind(tmp_path):
    done = opd("train", "examples/tools.yaml", f"run.dir={tmp_path}", "environment.name=none")
    assert done.returncode == 0, done.stderr
    assert max(accuracies(tmp_path)) < 0.3


@pytest.mark.slow
def test_rebuilt_models_have_the_same_skills_and_data(tmp_path):
    command = [sys.executable, str(TOOLS / "build.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), timeout=1100, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "skills.json").read_text())
    for model, found in skills().items():
        for kind, shares in found.items():
            assert again[model][kind] == pytest.approx(shares, abs=NEAR), (model, kind)
    for path in [*TOOLS.glob("data/*.jsonl"), *TOOLS.glob("models/*/*.json")]:
        assert (tmp_path / path.relative_to(TOOLS)).read_text() == path.read_text(), path
