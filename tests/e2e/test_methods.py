"""The examples that are named after a method, run as their first line says: each improves what it is for."""

import json
import shutil

import pytest
from program import ALONE, ROOT, assert_user_error, exported, here, opd, rows

LOSSES = ["grpo", "kdrl", "minillm", "tinker"]


def run(method, run_dir, *overrides):
    alone = {} if any(setting.startswith("parallel.") for setting in overrides) else ALONE
    done = opd("train", f"examples/{method}.yaml", f"run.dir={run_dir}", *overrides, env=alone)
    assert done.returncode == 0, done.stderr
    return rows(run_dir)


def column(found, name):
    return [row[name] for row in found if name in row]


@pytest.mark.parametrize("method", LOSSES)
def test_example_says_how_it_is_run(method):
    assert f"# megatron-opd train examples/{method}.yaml\n" in (ROOT / f"examples/{method}.yaml").read_text()


def test_grpo_learns_from_rewards_alone(tmp_path):
    found = run("grpo", tmp_path / "run", "train.export=false")
    rewards, accuracy = column(found, "reward/mean"), column(found, "eval/accuracy/all")
    assert rewards[0] < 0.2
    assert sum(rewards[-3:]) / 3 > 0.6
    assert accuracy[-1] > accuracy[0] + 0.5
    assert set(column(found, "loss/distill")) == {0.0}
    assert all(abs(x) < 0.1 for x in column(found, "advantage/mean"))  # centred in a group, whose lengths differ little


@pytest.mark.slow
def test_grpo_needs_no_teacher(tmp_path):
    found = run("grpo", tmp_path / "run", "teachers=[]", "train.export=false", "train.steps=2", "train.eval_every=0")
    taught = run("grpo", tmp_path / "taught", "train.export=false", "train.steps=2", "train.eval_every=0")
    assert column(found, "reward/mean") == column(taught, "reward/mean")  # which only looked on
    assert column(found, "kl/ensemble") == []
    done = here("train", "examples/grpo.yaml", f"run.dir={tmp_path}/none", "teachers=[]", "loss.weight=1")
    assert_user_error(done, "teachers: at least one teacher is needed")


def test_kdrl_improves_rewards_and_distance(tmp_path):
    found = run("kdrl", tmp_path / "run", "train.export=false")
    rewards, kl = column(found, "reward/mean"), column(found, "kl/ensemble")
    assert rewards[0] < 0.2
    assert sum(rewards[-3:]) / 3 > 0.6
    assert sum(kl[-3:]) / 3 < kl[0] / 3


@pytest.mark.parametrize("method", [pytest.param("minillm", marks=pytest.mark.slow), "tinker"])
def test_distance_to_the_teacher_falls(method, tmp_path):
    found = run(method, tmp_path / "run", "train.export=false")
    kl, accuracy = column(found, "kl/ensemble"), column(found, "eval/accuracy/all")
    assert sum(kl[-3:]) / 3 < kl[0] / 5
    assert accuracy[-1] > accuracy[0] + 0.5
    first = next(row for row in found if "loss" in row)
    # On fresh samples the teachers' advantage is minus the one-sample estimate of the reverse KL.
    assert first["distill/advantage"] == pytest.approx(-first["logprob/gap"], rel=0.2)
    assert (first["mismatch/kl"] > 0.02) == (method == "minillm")  # the teacher had a say in what was sampled
    after = column(found, "after/kl/ensemble")
    assert len(after) == (len(kl) if method == "tinker" else 0)
    assert all(less < more for less, more in zip(after, kl, strict=False))  # a step improves on its own answers


SMALL = ["train.steps=4", "train.save_every=2", "rollout.prompts_per_step=2", "train.micro_batch_size=8",
         "train.epochs=2", "parallel.data=2", "optim.schedule=linear", "train.eval_every=0"]  # fmt: skip


@pytest.mark.slow
def test_resume_in_the_middle_of_a_schedule_of_several_updates_is_bitwise(tmp_path):
    whole = run("kdrl", tmp_path / "whole", *SMALL)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step_00000004")
    assert run("kdrl", tmp_path / "cut", *SMALL) == whole
    assert exported(tmp_path / "cut") == exported(tmp_path / "whole")
    assert json.loads((tmp_path / "cut/checkpoints/step_00000004/loop.json").read_text())["step"] == 4
    assert whole[-1]["lr"] == pytest.approx(1e-3 / 16)  # the last of 4 steps x 2 mini-batches x 2 epochs


def test_training_rows_must_have_what_their_reward_needs(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1+1="}\n')
    source = f"data.train=[{{name: add, path: {path}}}]"
    done = here("check", "examples/grpo.yaml", source)
    assert_user_error(done, f"{path}, line 1", 'a text field "answer"')
    assert here("check", "examples/tinker.yaml", source, "data.eval=[]", "train.eval_every=0").returncode == 0
