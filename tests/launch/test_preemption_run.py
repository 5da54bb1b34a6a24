"""Warnings with time to save: ranks agree, save and leave with an exit code; hangs and deaths end in bounded time."""

import signal

import pytest
from program import PATIENCE_S, assert_gone, checkpoints, exported, rows, started, train

from megatron_opd.core import preemption, watchdog

TWO_RANKS = ["parallel.tensor=2"]
STEPS = ["train.steps=6", "train.save_every=0"]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["a rank", "the launcher"])
def test_a_warning_saves_and_the_same_command_goes_on_bitwise(tmp_path, whom):
    with started(tmp_path / "run", *TWO_RANKS, *STEPS) as run:
        run.wait_for_step(2)
        processes = run.everyone()
        warned = run.ranks()[1] if whom == "a rank" else run.process
        warned.send_signal(signal.SIGUSR1)
        returned, printed = run.end(timeout=PATIENCE_S)
    assert returned == preemption.EXIT_CODE, printed
    assert "Traceback" not in printed
    assert "error" not in printed
    assert_gone(processes)
    (saved,) = checkpoints(tmp_path / "run")
    step = int(saved.removeprefix("step_"))
    assert 2 <= step < 6
    assert f"making room; the same command continues from {tmp_path}/run/checkpoints/{saved}" in printed
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, step + 1))  # no step is done twice
    done = train(tmp_path / "run", *TWO_RANKS, *STEPS)
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {step}" in done.stderr
    whole = train(tmp_path / "whole", *TWO_RANKS, *STEPS)
    assert whole.returncode == 0, whole.stderr
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert exported(tmp_path / "run") == exported(tmp_path / "whole")


@pytest.mark.slow
def test_launch_restarts_from_the_newest_checkpoint(tmp_path):
    steps = ["train.steps=6", "train.save_every=2", "run.max_restarts=1"]
    with started(tmp_path / "run", *TWO_RANKS, *steps, command="launch") as run:
        for first in (3, 5):  # the second time, no restart is left
            run.wait_for_step(first)
            run.ranks()[1].kill()
        returned, printed = run.end(timeout=PATIENCE_S)
    assert returned == 1
    assert "starting again (0 more time(s) by run.max_restarts): the same command continues from" in printed
    assert printed.count("rank 1 was ended by SIGKILL") == 2
    assert "resuming after step 2" in printed


# Put first on PYTHONPATH: rank 0 never comes back from having a checkpoint's file on disk.
STUCK_AT_FSYNC = """
import os, time
fsync = os.fsync

def stuck_in_the_file_system(fd):
    if os.readlink(f"/proc/self/fd/{fd}").endswith(".distcp") and os.environ.get("RANK") == "0":
        time.sleep(10_000)
    fsync(fd)

os.fsync = stuck_in_the_file_system
"""


@pytest.mark.slow
def test_a_run_that_is_stuck_ends_and_shows_where_every_rank_was(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(STUCK_AT_FSYNC)
    steps = ["train.steps=2", "train.save_every=1", "run.timeout_s=40"]
    done = train(tmp_path / "run", *TWO_RANKS, *steps, env={"PYTHONPATH": str(site)})
    assert done.returncode == 1
    logs = tmp_path / "run/logs"
    assert f"{logs}/stacks-00000.txt, {logs}/stacks-00001.txt" in done.stderr
    assert "stuck_in_the_file_system" in (logs / "stacks-00000.txt").read_text()
    waiting = (logs / "stacks-00001.txt").read_text()
    assert "stuck_in_the_file_system" not in waiting
    assert "distributed_c10d.py" in waiting


def test_stacks_on_request(tmp_path):
    with started(tmp_path, "train.steps=100000") as run:
        run.wait_for_step(1)
        (rank,) = run.ranks()
        rank.send_signal(signal.SIGUSR2)
        run.wait_for_step(len(rows(tmp_path)) + 2)  # which it does not mind
        (stacks,) = watchdog.stacks(tmp_path / "logs")
        assert "megatron_opd/trainer/loop.py" in stacks.read_text()
