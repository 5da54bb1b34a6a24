"""The program under torchrun, its errors there, and the sinks that a run may have."""

import pytest
from program import CONFIG, ROOT, SMALL, assert_user_error, checkpoints, exported, opd, rows, torchrun, train

TWO_RANKS = [*SMALL, "parallel.tensor=2"]
TWO_STEPS = ["train.steps=2"]


def said_once(done, message):
    said = f"{done.stdout}\n{done.stderr}"
    assert done.returncode != 0, said
    assert said.count(message) == 1, said
    # torchrun has a traceback of its own, about a child that failed
    assert "megatron_opd/trainer/loop.py" not in said, said


def test_torchrun_starts_the_worker(tmp_path):
    done = torchrun(2, "train", CONFIG, *TWO_RANKS, *TWO_STEPS, f"run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert checkpoints(tmp_path) == ["step_00000002"]
    assert exported(tmp_path)


def test_more_ranks_than_the_layout_needs(tmp_path):
    done = torchrun(3, "train", CONFIG, *TWO_RANKS, *TWO_STEPS, f"run.dir={tmp_path}/run")
    layout = "parallel.tensor x parallel.pipeline x parallel.context x parallel.data = 2 x 1 x 1 x 1"
    said_once(done, f"error: 3 ranks were started, but {layout}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bad_input_under_torchrun_is_said_once(tmp_path):
    run = ["train", CONFIG, *TWO_RANKS, *TWO_STEPS, f"run.dir={tmp_path}/run"]
    said_once(torchrun(2, *run, "optim.larning=1"), "optim.larning: unknown setting")
    said_once(torchrun(2, *run, "student.model=no/such"), "no/such is not a Hugging Face model directory")
    assert not (tmp_path / "run").exists()


def test_bad_input_as_a_user_sees_it(tmp_path):
    run_dir = tmp_path / "run"
    done = opd("check", CONFIG, f"run.dir={run_dir}", "student.model=no/such", "train.stepss=1")
    assert_user_error(done, "train.stepss: unknown setting; did you mean train.steps?")
    done = opd("train", CONFIG, f"run.dir={run_dir}", "student.model=no/such")
    assert_user_error(done, "student.model: no/such is not a Hugging Face model directory")
    assert not run_dir.exists()


@pytest.mark.slow
def test_failure_of_another_rank_than_the_first_is_explained(tmp_path):
    """Rank 1 has another student there than rank 0 has looked at: nothing that a check beforehand can see."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import megatron_opd.models.weight_map as m\n"
        "    def broken(*args, **kwargs): raise ValueError('rank 1 cannot read its part')\n"
        "    m.stage_rules = broken\n"
    )
    env = {"PYTHONPATH": f"{site}:{ROOT}"}
    done = train(tmp_path / "run", *TWO_STEPS, "parallel.tensor=2", env=env)
    assert done.returncode == 1
    assert "rank 1 failed with exit code 1; the run has stopped" in done.stderr
    assert "error: rank 1 cannot read its part" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_tensorboard_and_offline_wandb(tmp_path):
    for steps in (2, 3):  # the second goes on with the first
        sinks = ["log.tensorboard=true", "log.wandb=offline"]
        done = train(tmp_path, f"train.steps={steps}", *sinks)
        assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in rows(tmp_path)])
