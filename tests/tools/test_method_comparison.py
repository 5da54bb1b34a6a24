"""The comparison of methods: what it reads, which learning rate it judges by, and the tool in its smallest form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from program import PATIENCE_S, ROOT, environment

sys.path.insert(0, str(ROOT / "tools"))


from method_comparison import runs, schedule
from method_comparison.methods import METHODS
from method_comparison.runs import Case, Point, Setting

from megatron_opd.config import file as config_file

SETTING = Setting(
    folder=Path("unused"),
    steps=4,
    prompts=8,
    samples=4,
    minibatches=4,
    epochs=1,
    eval_every=2,
    target=0.7,
    timeout_s=60,
)


def compare(*arguments):
    command = [sys.executable, "tools/compare_methods.py", *map(str, arguments)]
    how = {"cwd": ROOT, "timeout": PATIENCE_S, "text": True, "capture_output": True}
    return subprocess.run(command, env=environment(PYTHONPATH=str(ROOT)), **how)


def points(*accuracies):
    """A curve that is evaluated every second step."""
    return [Point(2 * i, accuracy, accuracy, 100.0 * i, 1.0 * i, {}) for i, accuracy in enumerate(accuracies)]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_config(name, tmp_path):
    """Valid, and with prompts, samples, student and schedule like all others."""
    case = Case(METHODS[name], 1e-3, 1)
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(runs._base(case.method, tmp_path)))
    config = config_file.load(path, runs._settings(case, SETTING))
    assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (8, 4)
    assert (config.train.steps, config.train.minibatches, config.train.micro_batch_size) == (4, 4, 8)
    assert config.student.model == "examples/quickstart/models/student"
    assert (config.optim.lr, config.run.seed, config.parallel.world_size) == (1e-3, 1001, 1)


def test_methods_differ_in_what_they_minimise():
    def of(name):
        case = Case(METHODS[name], 1e-3, 1)
        return tuple(sorted(case.method.settings)), case.method.only

    assert len({of(name) for name in METHODS}) == len(METHODS)


def test_a_curve_counts_tokens_and_seconds_up_to_each_evaluation(tmp_path):
    rows = [
        {"step": 0, "eval/avg@2/all": 0.1, "eval/avg@2/add": 0.2, "eval/accuracy/all": 0.3},
        {"step": 1, "tokens_per_s": 10.0, "time/generate": 1.0, "time/step": 2.0, "loss": 1.0},
        {"step": 2, "tokens_per_s": 20.0, "time/generate": 0.5, "time/score": 0.25, "time/sync": 0.25, "loss": 1.0},
        {"step": 2, "eval/avg@2/all": 0.8, "eval/avg@2/add": 0.9, "eval/accuracy/all": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert runs._read(tmp_path) == [
        Point(0, 0.1, 0.3, 0.0, 0.0, {"add": 0.2}),
        Point(2, 0.8, 1.0, 50.0, 4.0, {"add": 0.9}),
    ]


@pytest.mark.parametrize(
    ("tried", "chosen"),
    [
        ({1e-4: points(0, 0.5, 0.8), 1e-3: points(0, 0.7, 0.7)}, 1e-3),  # first to the target
        ({1e-4: points(0, 0.5, 0.6), 1e-3: points(0, 0.2, 0.7)}, 1e-3),  # the only one that gets there
        ({1e-4: points(0, 0.5, 0.6), 1e-3: points(0, 0.2, 0.6)}, 1e-4),  # none: better on the way
        ({1e-4: points(0, 0.3, 0.9), 1e-3: points(0, 0.2, 0.9)}, 1e-4),  # equal: the same
    ],
)
def test_the_learning_rate_that_a_method_is_judged_by(tried, chosen):
    assert schedule.best(tried, 0.7) == chosen


def test_seeds_that_never_reach_the_target_are_not_in_the_medians():
    curves = {1: points(0, 0.8, 0.9), 2: points(0, 0.2, 0.3)}
    found = schedule.Found(METHODS["grpo"], SETTING, 1e-3, {}, curves)
    assert [point.step for point in found.reached()] == [2]


def test_a_dry_run_names_the_runs_and_starts_none(tmp_path):
    done = compare("--methods", "grpo", "--dry-run", "--dir", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert "6 runs" in done.stdout
    assert "rl.weight=1" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_runs_are_kept_and_a_failure_names_its_log(tmp_path):
    few = ["--steps", 4, "--methods", "seqkd", "probs", "--lrs", "1e-3", "--seeds", 1, "--dir", tmp_path / "runs"]
    out = ["--json", tmp_path / "found.json", "--plot", tmp_path / "found.png"]
    done = compare(*few, *out)
    assert done.returncode == 0, done.stderr
    assert "SFT on teacher samples" in done.stdout
    assert "probability average" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())["methods"]
    assert [one["name"] for one in found] == ["seqkd", "probs"]
    assert [point["step"] for point in found[0]["curves"]["1"]] == [0, 2, 4]
    assert (tmp_path / "found.png").stat().st_size > 1000
    files = {path: path.read_bytes() for path in tmp_path.glob("runs/**/metrics.jsonl")}
    assert len(files) == 4
    assert compare(*few, *out).returncode == 0
    assert {path: path.read_bytes() for path in files} == files  # nothing was trained again
    failed = compare(*few, "--prompts", 3, "--minibatches", 5)
    assert failed.returncode == 1
    assert "error: a run failed; see " in failed.stderr
    assert "train.minibatches (5) must divide" in failed.stderr  # the end of its log
    assert "Traceback" not in failed.stderr
