"""Whole runs with an environment: the example with tools, cut off in the middle of an episode, on more ranks."""

import json
from pathlib import Path

import pytest
from program import ALONE, assert_user_error, exported, here, opd, rows

HERE = Path(__file__).parent
FEW = [
    *("rollout.prompts_per_step=6", "rollout.samples_per_prompt=2", "train.micro_batch_size=3", "run.timeout_s=300"),
    *("train.steps=4", "train.save_every=2", "train.eval_every=2", "data.eval.0.rows=8", "log.completions_every=4"),
]
OWN = ["environment.name=lessons_in_turns:Lessons", "environment.tools=[]"]


def train(run_dir, *overrides, launched=False, **env):
    env = {"PYTHONPATH": str(HERE), **({} if launched else ALONE), **env}
    return opd("train", "examples/tools.yaml", f"run.dir={run_dir}", *FEW, *overrides, env=env)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    done = train(run_dir, *OWN)
    assert done.returncode == 0, done.stderr
    return run_dir


def test_episodes_are_told_of(whole):
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if "loss" in row]
    assert len(steps) == 4
    assert all(row["episode/turns"] > 1 for row in steps)
    answers = [json.loads(line) for line in (whole / "completions.jsonl").read_text().splitlines()]
    assert any("<tool_call>" in json.dumps(answer) for answer in answers)


@pytest.mark.parametrize("kill_at", [3, 40])
def test_a_run_killed_in_the_middle_of_an_episode_resumes_bitwise(whole, tmp_path, kill_at):
    killed = train(tmp_path, *OWN, KILL_AT=str(kill_at))
    assert killed.returncode != 0
    assert not (tmp_path / "hf").exists()
    done = train(tmp_path, *OWN, NAP_S="0.02")  # how long the environment takes changes no bit
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path) == rows(whole)
    assert exported(tmp_path) == exported(whole)


def test_the_tools_by_their_name_are_the_same(whole, tmp_path):
    done = train(tmp_path)
    assert done.returncode == 0, done.stderr
    assert exported(tmp_path) == exported(whole)


@pytest.mark.slow
def test_four_ranks_end_at_the_same_numbers(whole, tmp_path):
    layout = ["parallel.tensor=2", "parallel.data=2", "train.packing=true"]
    done = train(tmp_path, *OWN, *layout, launched=True)
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(rows(tmp_path), rows(whole), strict=True):
        theirs = {name: value for name, value in theirs.items() if not name.startswith("batch/")}
        assert {name: mine[name] for name in theirs} == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_what_cannot_be_is_refused_before_anything_starts(tmp_path):
    refused = here("check", "examples/tools.yaml", f"run.dir={tmp_path}", "environment.tools=[calculater]")
    assert_user_error(refused, "calculater")
    refused = here("check", "examples/tools.yaml", f"run.dir={tmp_path}", "environment.max_tokens=10")
    assert_user_error(refused, "environment.max_tokens")
