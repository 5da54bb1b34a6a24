"""tools/gpu_checks.sh with a Python that only notes what it is asked: everything is run, limited, and in the table."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """#!/bin/bash
case "$1" in
  -) cat >/dev/null; echo "A device" ;;
  -c) exit {has_transformer_engine} ;;
  tools/gpu_table.py) exec {python} "$@" ;;
  *) echo "$@" >>{calls}
     case "$*" in
       *recipe=blockwise*) echo "no such kernel"; exit 3 ;;
       *bench_loss*) sleep 30 ;;
     esac ;;
esac
"""


def checks(tmp_path, *, has_transformer_engine, **env):
    """(exit code, output, commands, table rows by check)."""
    python, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    calls.touch()
    status = 0 if has_transformer_engine else 1
    python.write_text(STAND_IN.format(python=sys.executable, calls=calls, has_transformer_engine=status))
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "tools/gpu_checks.sh"],
        env={**os.environ, "PYTHON": str(python), "OUT": str(out), "LIMIT": "5", **env},
        text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    rows = [line.strip("|").split("|") for line in done.stdout.splitlines() if re.match(r"\| [a-z]", line)]
    return done, calls.read_text(), {cells[0].strip(): cells[1].strip() for cells in rows if "---" not in cells[0]}


def test_everything_is_tried_and_one_failure_stops_nothing(tmp_path):
    done, calls, results = checks(tmp_path, has_transformer_engine=True)
    assert done.returncode == 1
    results.pop("check")
    assert results.pop("loss-kernels") == "FAILED (124)"  # which took too long
    assert results.pop("quickstart-fp8-blockwise") == "FAILED (3)"
    assert "no such kernel" in done.stdout
    assert set(results) == {
        *("gpu-tests", "fp8-emulated", "fp8-against-bf16", "fp8-delayed"),
        *(f"quickstart-{name}" for name in ("fp32", "bf16", "fp16", "head-fp8", "fp8-tensorwise", "fp8-resident")),
    }
    assert set(results.values()) == {"ok"}
    assert "-m pytest -q -m gpu" in calls
    real = next(line for line in calls.splitlines() if "quickstart-fp8-tensorwise" in line and "train" in line)
    assert "student.dtype=bf16" in real
    assert "emulate" not in real


def test_without_transformer_engine_the_table_says_so(tmp_path):
    _, calls, results = checks(tmp_path, has_transformer_engine=False)
    assert results["fp8"] == "skipped: Transformer Engine is not installed"
    assert "quickstart-fp8" not in calls


def test_wheels_are_installed_and_built_offline(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "a.whl").touch()
    (wheels / "transformer_engine_torch-2.11.0.tar.gz").touch()
    _, calls, results = checks(tmp_path, has_transformer_engine=True, WHEELS=str(wheels))
    assert results["install-wheels"] == results["build-transformer-engine"] == "ok"
    installs = [line for line in calls.splitlines() if "pip install" in line]
    assert len(installs) == 2
    assert all("--no-index" in line and "--no-deps" in line for line in installs)
    assert "--no-build-isolation" in installs[1]


def test_a_run_in_the_table(tmp_path):
    (tmp_path / "machine.txt").write_text("A device\nlayers: x\n")
    (tmp_path / "results.tsv").write_text("quickstart-bf16\tok\t12\ngpu-tests\tok\t3\n")
    run = tmp_path / "quickstart-bf16"
    run.mkdir()
    rows = [
        {"step": 0, "fp8/ratio/a": 0.01, "fp8/ratio/student": 0.02},
        {"step": 0, "eval/accuracy/all": 0.1, "eval/kl/ensemble": 1.5},
        *({"step": i, "tokens_per_s": speed} for i, speed in enumerate([10, 400, 300], start=1)),
        {"step": 3, "eval/accuracy/all": 0.975, "eval/kl/ensemble": 0.03},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "tools/gpu_table.py", tmp_path]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60, check=True)
    assert "| quickstart-bf16 | ok | 12 | 97.5% | 0.0300 | 300 | 2.000% |" in done.stdout
    assert "| gpu-tests | ok | 3 |  |  |  |  |" in done.stdout
    assert "A device; layers: x" in done.stdout
    assert (tmp_path / "table.md").read_text() == done.stdout
    (tmp_path / "results.tsv").unlink()
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 2
    assert "no results.tsv: is it the OUT of tools/gpu_checks.sh?" in " ".join(done.stderr.split())
