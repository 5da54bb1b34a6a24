"""The examples are what `check` accepts, and begin with how to run them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opd.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.name for path in ROOT.glob("examples/*.yaml"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_check_accepts_it(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    settings = [f"run.dir={tmp_path / 'run'}"]
    if name == "gold.yaml":  # its first line makes its teachers
        subprocess.run(
            [sys.executable, "examples/cross_tokenizer/relabel.py", "--out", tmp_path], check=True, timeout=120
        )
        settings += [f"teachers.0.model={tmp_path}/teacher_carry", f"teachers.1.model={tmp_path}/teacher_compare"]
    if name == "plan.yaml":  # whose models are not here
        settings.append("--settings-only")
    assert main(["check", f"examples/{name}", *settings]) == 0
    assert "trainer: " in capsys.readouterr().out


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_first_lines_say_how_to_run_it_and_what_to_expect(name):
    head = re.match(r"(?:#.*\n)+", (ROOT / "examples" / name).read_text())[0]
    assert f"examples/{name}" in head or "make quickstart" in head
    assert "Expected" in head
    assert re.search(r"rank|GPU|CPU", head)
