"""The quickstart at full length, with the commands that a newcomer is told, and what it promises."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from program import CONFIG, PATIENCE_S, ROOT, checkpoints, environment, opd

TASKS = ["add", "subtract", "max", "min"]
STEPS = 40


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """(run.dir, what was printed)."""
    run_dir = tmp_path_factory.mktemp("quickstart") / "run"
    done = opd("train", CONFIG, f"run.dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir, done


@pytest.fixture(scope="module")
def metrics(quickstart):
    lines = (quickstart[0] / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def accuracies(metrics, prefix="eval/accuracy/"):
    """{task: accuracy} of the first and of the last evaluation."""
    found = [{t: row[prefix + t] for t in [*TASKS, "all"]} for row in metrics if prefix + "all" in row]
    return found[0], found[-1]


def test_student_learns_from_both_teachers(metrics):
    before, after = accuracies(metrics)
    assert after["all"] >= 2 * before["all"]
    for teacher in ("carry", "compare"):
        its, _ = accuracies(metrics, f"eval/teacher/{teacher}/accuracy/")
        assert after["all"] > its["all"] + 0.2
    assert after["all"] > 0.9  # what the head of quickstart.yaml expects, with room for another rounding
    assert min(after.values()) > 0.8
    kl = [row["eval/kl/ensemble"] for row in metrics if "eval/kl/ensemble" in row]
    assert kl[-1] < kl[0] / 5


def test_every_step_is_logged_once_under_the_documented_names(metrics):
    steps = [row for row in metrics if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    wanted = {
        *("mismatch/kl", "rollout/version_lag", "kl/carry", "kl/compare", "kl/ensemble", "lr", "grad_norm"),
        *("logprob/student", "logprob/teacher", "logprob/gap", "perplexity/student", "perplexity/teacher"),
        *("time/generate", "time/score", "time/step", "time/sync", "tokens_per_s", "rollout/length"),
    }
    for row in steps:
        assert wanted <= set(row)
        assert row["rollout/version_lag"] == 0
        assert abs(row["mismatch/kl"]) < 1e-4  # trainer and sampler have the same weights


def test_what_is_printed(quickstart):
    run_dir, done = quickstart
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    phases = (
        "checking the settings of ", "starting 4 ranks", "importing torch and Megatron", "reading the models' configs",
        "loading the student ", r"loading teacher (carry|compare) ", "starting who answers", "looking for a checkpoint",
        "handing the weights to the engine", r"evaluating (after step \d+|teacher \w+)", "comparing the answers with",
        r"step \d+: (sampling|scoring by|updating the student)", r"step \d+/40  ", r"answer to \w+, row \d+  ",
        r"  (prompt|answer): ", r"saving after step \d+", "saved ", "exporting the student", "exported ", "done; ",
    )  # fmt: skip
    ours = re.compile(rf"\d\d:\d\d:\d\d  ({'|'.join(phases)})")
    unexpected = [line for line in lines if not ours.match(line)]
    assert unexpected == []
    assert lines[-1].endswith(f"done; for tables and a plot: megatron-opd report {run_dir}")
    assert checkpoints(run_dir) == ["step_00000020", "step_00000040"]
    assert sum(f"step {STEPS}/{STEPS}  loss" in line for line in (run_dir / "train.log").read_text().splitlines()) == 1


def test_export_scores_in_transformers_what_the_last_evaluation_logged(quickstart, metrics):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(quickstart[0] / "hf", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(quickstart[0] / "hf")
    _, after = accuracies(metrics)
    for task in TASKS:
        lines = (ROOT / f"examples/quickstart/data/{task}.eval.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt")  # all of one length
        with torch.no_grad():
            out = model.generate(**batch, max_new_tokens=8, do_sample=False)
        said = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [one == row["answer"] for one, row in zip(said, rows, strict=True)]
        assert sum(right) / len(right) == pytest.approx(after[task])


def test_eval_command_scores_what_the_last_evaluation_logged(quickstart, metrics):
    run_dir, _ = quickstart
    done = opd("eval", CONFIG, f"run.dir={run_dir}")
    assert done.returncode == 0, done.stderr
    assert f"{run_dir}/hf" in done.stdout
    printed = dict(re.findall(r"│ (\w+) +│ +([\d.]+) \[\d+–\d+\] │", done.stdout))
    assert printed == {task: f"{100 * value:.1f}" for task, value in accuracies(metrics)[1].items()}


def test_report_command(quickstart, tmp_path):
    run_dir, _ = quickstart
    script = Path(sys.executable).with_name("megatron-opd")  # as installed
    done = subprocess.run(
        [script, "report", run_dir], cwd=tmp_path, env=environment(), timeout=PATIENCE_S, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for fragment in (*TASKS, "carry", "compare", "40 of 40 steps", "tokens/s"):
        assert fragment in done.stdout
    places = dict(re.findall(r"^([\w ]+): (/.+)$", done.stdout, re.MULTILINE))
    assert {"newest checkpoint", "metrics", "log", "Hugging Face export", "tables", "plot"} <= set(places)
    assert all(Path(place).exists() for place in places.values())


def test_report_of_a_copy_that_was_cut_off(quickstart, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(quickstart[0], copy, ignore=shutil.ignore_patterns("hf", "checkpoints"))
    data = (copy / "metrics.jsonl").read_bytes()
    (copy / "metrics.jsonl").write_bytes(data[: len(data) // 2])
    done = opd("report", copy)
    assert done.returncode == 0, done.stderr
    assert "(unfinished)" in done.stdout
