"""Warnings, deaths and ends of jobs: a run goes on where it was, and ends where an undisturbed one ends."""

import pytest
from program import checkpoints, rows
from slurm.small import CONFIG, ONE_TEACHER, assert_same, local

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]


def test_a_warning_requeues_and_the_job_goes_on(submit, cluster, tmp_path, whole):
    job = submit("opd_70b_to_8b.sh", *ONE_TEACHER)
    job.wait_for("step 3/", tmp_path / "run/train.log")
    with cluster.held(job):
        job.signal("USR1")
    job.wait_for_requeue()
    step = int(checkpoints(tmp_path / "run")[-1].removeprefix("step_"))
    assert 3 <= step < 8
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, step + 1))  # none is done again
    code, said = job.end()
    assert code == 0, said
    assert "the run has saved and made room; requeueing" in said
    assert f"resuming after step {step}" in (tmp_path / "run/train.log").read_text()
    assert_same(tmp_path / "run", whole)


def test_a_killed_rank_restarts_within_the_job(submit, cluster, tmp_path, whole):
    job = submit("opd_70b_to_8b.sh", *ONE_TEACHER)
    job.wait_for("step 3/", tmp_path / "run/train.log")
    cluster.rank(1, job).kill()
    code, said = job.end()
    assert code == 0, said
    assert "starting the ranks again" in said
    assert job.shown()["Restarts"] == "0"
    assert_same(tmp_path / "run", whole)


def test_an_urgent_job_takes_the_nodes_and_gives_them_back(submit, cluster, tmp_path, whole):
    job = submit("opd_70b_to_8b.sh", *ONE_TEACHER)
    job.wait_for("step 3/", tmp_path / "run/train.log")
    with cluster.held(job):
        urgent = cluster.submit_urgent(tmp_path)
    job.wait_for_requeue()
    step = int(checkpoints(tmp_path / "run")[-1].removeprefix("step_"))
    assert 3 <= step < 8
    assert urgent.end()[0] == 0
    code, said = job.end()
    assert code == 0, said
    assert "the run has saved and made room; requeueing" in said
    assert f"resuming after step {step}" in (tmp_path / "run/train.log").read_text()
    assert_same(tmp_path / "run", whole)


def test_a_cancelled_job_leaves_a_checkpoint_and_no_process(submit, cluster, tmp_path, whole):
    job = submit("opd_70b_to_8b.sh", *ONE_TEACHER, "train.save_every=0")
    job.wait_for("step 3/", tmp_path / "run/train.log")
    job.cancel()
    job.end()
    assert job.shown()["JobState"] == "CANCELLED"
    assert job.shown()["Restarts"] == "0"
    cluster.until(lambda: not cluster.processes(job), "all processes of the job have ended")
    (saved,) = checkpoints(tmp_path / "run")
    step = int(saved.removeprefix("step_"))
    assert 3 <= step < 8
    local(tmp_path / "run", CONFIG, *ONE_TEACHER)
    assert f"resuming after step {step}" in (tmp_path / "run/train.log").read_text()
    assert_same(tmp_path / "run", whole)


def test_a_killed_node_requeues(submit, cluster, tmp_path, whole):
    # Without GPUs: Slurm 22.05 forgets those of a requeued job when one of its nodes goes down. It also miscounts those
    # of the nodes that the job went on with, and then preempts nobody there: so this is the last test here.
    job = submit("opd_70b_to_8b.sh", *ONE_TEACHER, options=["--gpus-per-node=0"], OPD_GPUS_PER_NODE="0")
    job.wait_for("step 3/", tmp_path / "run/train.log")
    cluster.kill_node("n2")
    try:
        job.wait_for_requeue()
        code, said = job.end()
        assert code == 0, said
        assert len(job.nodes()) == 2
        assert "n2" not in job.nodes()
        assert_same(tmp_path / "run", whole)
    finally:
        cluster.start_node("n2")
