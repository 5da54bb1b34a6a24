"""The committed models and data of the quickstart are those that its one command makes."""

import json
import subprocess
import sys

import pytest
from program import ROOT, environment

QUICKSTART = ROOT / "examples/quickstart"
NEAR = 0.1
"""Other processors and releases round differently, and then training ends in slightly other weights."""


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    out = tmp_path_factory.mktemp("rebuilt")
    command = [sys.executable, str(QUICKSTART / "build.py"), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), timeout=1100, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return out


def test_committed_files_are_small():
    tracked = subprocess.run(["git", "ls-files", "examples"], cwd=ROOT, text=True, capture_output=True, check=True)
    sizes = {name: (ROOT / name).stat().st_size for name in tracked.stdout.splitlines()}
    assert sum(sizes.values()) <= 2_000_000, sizes


def test_committed_skills_are_what_the_quickstart_needs():
    skills = json.loads((QUICKSTART / "skills.json").read_text())
    carry, compare, student = (skills[n]["greedy"] for n in ("teacher_carry", "teacher_compare", "student"))
    assert min(carry["add"], carry["subtract"], compare["max"], compare["min"]) > 0.9
    assert max(carry["max"], carry["min"], compare["add"], compare["subtract"]) < 0.1
    assert max(student.values()) < 0.2


@pytest.mark.slow
def test_rebuilt_models_have_the_same_skills(rebuilt):
    committed = json.loads((QUICKSTART / "skills.json").read_text())
    again = json.loads((rebuilt / "skills.json").read_text())
    for model, skills in committed.items():
        for kind in skills:
            assert again[model][kind] == pytest.approx(skills[kind], abs=NEAR), (model, kind)


@pytest.mark.slow
def test_rebuilt_data_and_tokenizer_are_the_same(rebuilt):
    for path in [*QUICKSTART.glob("data/*.jsonl"), *QUICKSTART.glob("models/*/*.json")]:
        assert (rebuilt / path.relative_to(QUICKSTART)).read_text() == path.read_text(), path
    for model in ("student", "teacher_carry", "teacher_compare"):
        files = sorted(path.name for path in (QUICKSTART / "models" / model).iterdir())
        assert sorted(path.name for path in (rebuilt / "models" / model).iterdir()) == files
