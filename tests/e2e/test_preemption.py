"""Warnings with time to save: ranks agree, save and leave with an exit code; hangs and deaths end in bounded time."""

import signal

import pytest
from program import assert_gone, checkpoints, exported, rows, started, train

from megatron_opd import preemption

FOUR_RANKS = ["parallel.tensor=2", "parallel.data=2", "train.micro_batch_size=2"]
STEPS = ["train.steps=6", "train.save_every=0"]


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("whom", ["a rank", "the launcher"])
def test_a_warning_saves_and_the_same_command_goes_on_bitwise(tmp_path, whom):
    with started(tmp_path / "run", *FOUR_RANKS, *STEPS) as run:
        run.wait_for_step(2)
        processes = run.everyone()
        warned = run.ranks()[3] if whom == "a rank" else run.process
        warned.send_signal(signal.SIGUSR1)
        returned, printed = run.end(timeout=120)
    assert returned == preemption.EXIT_CODE, printed
    assert "Traceback" not in printed
    assert "error" not in printed
    assert_gone(processes)
    (saved,) = checkpoints(tmp_path / "run")
    step = int(saved.removeprefix("step_"))
    assert 2 <= step < 6
    assert f"making room; the same command continues from {tmp_path}/run/checkpoints/{saved}" in printed
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, step + 1))  # no step is done twice
    done = train(tmp_path / "run", *FOUR_RANKS, *STEPS)
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {step}" in done.stderr
    whole = train(tmp_path / "whole", *FOUR_RANKS, *STEPS)
    assert whole.returncode == 0, whole.stderr
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert exported(tmp_path / "run") == exported(tmp_path / "whole")
