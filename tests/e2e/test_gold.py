"""The example of teachers with another tokenizer, run as its first line says, with fewer steps."""

import subprocess
import sys

import pytest
from program import ROOT, assert_user_error, here, opd, rows


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    out = tmp_path_factory.mktemp("cross_tokenizer")
    script = ROOT / "examples/cross_tokenizer/relabel.py"
    subprocess.run([sys.executable, script, "--out", out], check=True, timeout=120)
    return [f"teachers.{i}.model={out}/teacher_{name}" for i, name in enumerate(("carry", "compare"))]


@pytest.mark.slow
def test_the_student_learns_from_teachers_that_read_other_tokens(teachers, tmp_path):
    done = opd(
        "train", "examples/gold.yaml", *teachers, f"run.dir={tmp_path / 'run'}", "parallel.tensor=2", "train.steps=15",
        "train.eval_every=15", "train.export=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "run")
    accuracy = [row["eval/accuracy/all"] for row in found if "eval/accuracy/all" in row]
    kl = [row["kl/ensemble"] for row in found if "kl/ensemble" in row]
    assert accuracy[0] < 0.1
    assert accuracy[-1] > 0.6
    assert sum(kl[-3:]) / 3 < kl[0] / 4
    aligned = [row[f"uld/{name}/aligned_frac"] for row in found for name in ("carry", "compare") if "loss" in row]
    assert set(aligned) == {1.0}


def test_what_such_teachers_do_not_allow(teachers, tmp_path):
    settings = ["check", "examples/gold.yaml", *teachers, f"run.dir={tmp_path / 'run'}"]
    assert_user_error(here(*settings, "teachers.0.tokenizer=student"), "all must say own")
    assert_user_error(here(*settings, "teachers.0.carrier=topk", "teachers.0.backend=sglang"), "needs hidden, not topk")
    assert_user_error(here(*settings, "policy.kl_coef=1"), "policy.kl_coef")
    assert_user_error(here(*settings, "answers.lmbda=0.5", "answers.seq_kd=true"), "cannot sample")
