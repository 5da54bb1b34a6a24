"""FP8 as a user meets it: refused by name, shown by check, measured before the first step, and trained with."""

import subprocess
import sys

import pytest
import yaml
from program import CONFIG, PATIENCE_S, ROOT, SMALL, assert_user_error, environment, here, rows, train

BF16 = ["student.dtype=bf16", "teachers.0.dtype=bf16", "teachers.1.dtype=bf16"]
FP8 = ["precision.fp8.student=full", "precision.fp8.teachers=[all]"]
EMULATED = [*FP8, "precision.fp8.heads=[all]", "precision.fp8.emulate=true", "precision.fp8.check_prompts=8"]


def test_without_a_gpu_fp8_is_refused_by_name():
    done = here("check", CONFIG, *FP8, *BF16)
    assert_user_error(done, "precision.fp8: there is no CUDA device here", "precision.fp8.emulate=true")


def test_shapes_that_the_kernels_do_not_take_are_refused():
    done = here("check", CONFIG, *EMULATED, "precision.fp8.recipe=mxfp8")  # at tensor=2
    assert_user_error(done, "precision.fp8.recipe=mxfp8 needs multiples of 32", "teacher 'carry' is 48")


def test_check_prints_the_plan():
    done = here("check", CONFIG, *EMULATED)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("# precision of")]
    assert [line.split(":")[0] for line in lines] == [
        "# precision of student", "# precision of teacher carry", "# precision of teacher compare",
    ]  # fmt: skip
    assert all(line.endswith("everything else fp32 (emulated)") for line in lines)
    settings = yaml.safe_load("\n".join(line for line in done.stdout.splitlines() if not line.startswith("#")))
    assert settings["precision"]["fp8"]["student"] == "full"


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([], id="one rank"),
        pytest.param(["precision.fp8.student=forward"], id="forward alone", marks=pytest.mark.slow),
        pytest.param(["parallel.tensor=2", "parallel.sequence=true"], id="tp2sp", marks=pytest.mark.slow),
        pytest.param(
            ["parallel.tensor=2", "parallel.sequence=true", "train.packing=true"], id="packed", marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_measures_and_trains(tmp_path, extra):
    run_dir = tmp_path / "run"
    done = train(run_dir, *EMULATED, "train.steps=2", *extra)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("precision of student") == 1
    first, *steps = rows(run_dir)
    names = {name.removeprefix("fp8/kl/") for name in first if name.startswith("fp8/kl/")}
    assert names == {"carry", "compare", "ensemble", "student"}
    assert all(0 < first[f"fp8/ratio/{name}"] < 0.1 for name in names)
    assert 0 < first["fp8/gradient_error"] < 1
    for name in names:
        assert f"fp8: {name}: KL " in done.stderr
    assert [row["step"] for row in steps] == [1, 2]


def test_a_run_that_fp8_would_spoil_is_refused_before_it_trains(tmp_path):
    done = train(tmp_path / "run", *EMULATED, "train.steps=1", "precision.fp8.max_kl_ratio=1e-9")
    assert_user_error(done, "precision.fp8.max_kl_ratio=1e-09", "precision.fp8.on_exceed=warn")
    assert not any("loss" in row for row in rows(tmp_path / "run"))
    too_low = ["precision.fp8.max_kl_ratio=1e-9", "precision.fp8.on_exceed=warn"]
    warned = train(tmp_path / "other", *EMULATED, "train.steps=1", *too_low)
    assert warned.returncode == 0, warned.stderr
    assert "warning: FP8 changes" in warned.stderr


@pytest.mark.slow
def test_an_interrupted_run_continues_as_one_that_was_not(tmp_path):
    """Nothing of FP8 is remembered from pass to pass but by the recipe delayed; and it is measured once."""
    steps = ["train.save_every=1", "optim.schedule=constant"]
    whole = train(tmp_path / "whole", *EMULATED, *steps, "train.steps=2")
    assert whole.returncode == 0, whole.stderr
    assert train(tmp_path / "parts", *EMULATED, *steps, "train.steps=1").returncode == 0
    resumed = train(tmp_path / "parts", *EMULATED, *steps, "train.steps=2")
    assert "fp8: " not in resumed.stderr
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


@pytest.mark.slow
def test_the_tool_compares_recipes_and_refuses():
    def check(*arguments):
        command = [sys.executable, "tools/check_fp8.py", CONFIG, *SMALL[:2], "precision.fp8.check_prompts=4"]
        how = {"cwd": ROOT, "timeout": PATIENCE_S, "text": True, "capture_output": True}
        return subprocess.run([*command, *arguments], env=environment(PYTHONPATH=str(ROOT)), **how)

    done = check("--emulate", "--recipes", "tensorwise", "blockwise")
    assert done.returncode == 0, done.stderr
    for recipe in ("tensorwise", "blockwise"):
        for name in ("carry", "compare", "ensemble", "student", "gradient"):
            assert any(recipe in line and name in line for line in done.stdout.splitlines() if "│" in line)
        assert f"{recipe}: " in done.stdout
    refused = check("--emulate", "precision.fp8.max_kl_ratio=1e-9")
    assert refused.returncode == 1
    assert "tensorwise: FP8 changes the student by" in refused.stdout
    assert_user_error(check(*BF16), "there is no CUDA device here")
