"""Ctrl-C, signals, dying ranks, full disks: the program ends soon, says what to do, and loses nothing saved."""

import os
import resource
import signal

import psutil
import pytest
from program import CONFIG, SMALL, Terminal, assert_gone, assert_user_error, checkpoints, started, train

from megatron_opd.core import preemption
from megatron_opd.core import run_dir as run_directory
from megatron_opd.launch import oom

ENDLESS = ["train.steps=100000", "train.save_every=2"]
TWO_RANKS = ["parallel.tensor=2"]
END_S = 240.0
"""Tells an end from a hang, also on a busy machine. Promptness is what tools/bench_interruption.py measures."""


def interrupt(process):
    process.send_signal(signal.SIGINT)


def terminate(process):
    process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        pytest.param(terminate, 143, id="TERM"),
        pytest.param(interrupt, 130, id="INT", marks=pytest.mark.slow),
    ],
)
def test_signal_ends_all_ranks_and_the_run_can_continue(tmp_path, stop, code):
    with started(tmp_path, *TWO_RANKS, *ENDLESS) as run:
        run.wait_for_step(3)
        processes = run.everyone()
        stop(run.process)
        returned, printed = run.end(timeout=END_S)
    assert returned == code
    assert_gone(processes)
    assert "Traceback" not in printed
    assert_says_how_to_continue(tmp_path, printed)


@pytest.mark.slow
def test_control_c_in_a_terminal(tmp_path):
    terminal = Terminal("train", CONFIG, *SMALL, f"run.dir={tmp_path}", *ENDLESS)
    try:
        terminal.read_until("step_00000004")
        launcher = psutil.Process(terminal.process.pid)
        processes = [launcher, *launcher.children(recursive=True)]
        terminal.type(b"\x03")
        assert terminal.read_until(timeout=END_S) == 130
    finally:
        terminal.close()
    assert_gone(processes)
    last = assert_says_how_to_continue(tmp_path, terminal.shown)
    assert "\x1b[?25l" in terminal.shown  # the progress bar hides the cursor
    assert "\x1b[?25h" in terminal.shown.rpartition("\x1b[?25l")[2]
    done = train(tmp_path, *ENDLESS, f"train.steps={last + 1}")
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {last}" in done.stderr


def assert_says_how_to_continue(run_dir, printed):
    """That the last complete checkpoint is named, on a line of its own; returns its step."""
    last = checkpoints(run_dir)[-1]
    (message,) = [line for line in printed.splitlines() if line.startswith("error:")]
    assert message == f"error: interrupted; the same command continues from {run_dir}/checkpoints/{last}"
    return int(last.removeprefix("step_"))


def test_interrupted_before_anything_has_started(tmp_path):
    with started(tmp_path, *ENDLESS, cold=True) as run:
        # Python has started, and imports what it reads its config with: Python code, which a signal ends in order.
        run.wait_for_library("markupsafe")
        os.killpg(run.process.pid, signal.SIGINT)
        returned, printed = run.end(timeout=END_S)
    assert returned == 130
    assert "Traceback" not in printed
    assert "error: interrupted" in printed


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGUSR1, preemption.EXIT_CODE)],
)
def test_interrupted_while_its_settings_are_checked(tmp_path, number, code):
    """That may take long, and nothing has been started yet."""
    run_dir, endless = tmp_path / "run", tmp_path / "prompts.jsonl"
    os.mkfifo(endless)
    data = ["data.eval=[]", f"data.train=[{{name: add, path: {endless}}}]"]
    with started(run_dir, *data) as run:
        run.wait_for_line("checking the settings")
        run.process.send_signal(number)
        returned, printed = run.end(timeout=END_S)
    assert returned == code
    assert "Traceback" not in printed
    assert printed.count("error: interrupted; ") == (number != signal.SIGUSR1)
    assert not run_dir.exists()


def test_rank_that_dies_ends_the_others_and_is_named(tmp_path):
    with started(tmp_path, *TWO_RANKS, *ENDLESS) as run:
        run.wait_for_step(3)
        processes = run.everyone()
        run.ranks()[1].kill()
        returned, printed = run.end(timeout=END_S)
    assert returned == 1
    assert_gone(processes)
    counts = oom.Kills().since() is not None  # what this kernel tells
    why = "somebody sent it: memory did not run out" if counts else "did this machine run out of memory?"
    assert printed.endswith(f"error: rank 1 was ended by SIGKILL ({why}); the run has stopped\n")
    assert "Traceback" not in printed
    assert checkpoints(tmp_path)


@pytest.mark.slow
def test_rank_that_somebody_terminates_is_named(tmp_path):
    with started(tmp_path, *TWO_RANKS, *ENDLESS) as run:
        run.wait_for_step(3)
        processes = run.everyone()
        terminate(run.ranks()[1])
        returned, printed = run.end(timeout=END_S)
    assert returned == 1
    assert_gone(processes)
    assert "rank 1 was ended by SIGTERM; the run has stopped" in printed
    assert "Traceback" not in printed


def deaf():
    """As `nohup` and a shell's background leave a program."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_signals_that_were_ignored_at_the_start_stay_so(tmp_path):
    with started(tmp_path, *TWO_RANKS, *ENDLESS, preexec_fn=deaf) as run:
        run.wait_for_step(1)
        processes = run.everyone()
        for process in processes:
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGINT)
        run.wait_for_step(last_step(tmp_path) + 3)
        terminate(run.process)
        returned, printed = run.end(timeout=END_S)
    assert returned == 143
    assert_gone(processes)
    assert_says_how_to_continue(tmp_path, printed)


def last_step(run_dir):
    return len((run_dir / "metrics.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_a_terminal_that_goes_away_ends_the_run(tmp_path):
    with started(tmp_path, *TWO_RANKS, *ENDLESS) as run:
        run.wait_for_step(3)
        processes = run.everyone()
        run.process.send_signal(signal.SIGHUP)
        returned, printed = run.end(timeout=END_S)
    assert returned == 129
    assert_gone(processes)
    assert_says_how_to_continue(tmp_path, printed)


def test_ranks_end_with_a_launcher_that_dies_without_a_word(tmp_path):
    with started(tmp_path, *TWO_RANKS, *ENDLESS) as run:
        run.wait_for_step(3)
        processes = run.everyone()
        run.ranks()[1].send_signal(signal.SIGSTOP)
        psutil.Process(run.process.pid).kill()
        run.end(timeout=END_S)
    assert_gone(processes)


def test_second_run_in_the_same_directory_is_refused(tmp_path):
    with run_directory.claimed(tmp_path):
        done = train(tmp_path, "train.steps=1")
    assert_user_error(done, f"another run is writing to {tmp_path} (process")
    assert not (tmp_path / "metrics.jsonl").exists()


def small_files():
    """Files cannot grow beyond 100 kB: writing more fails as it does on a full disk, whoever the user is."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.slow
def test_full_disk_during_a_save(tmp_path):
    steps = ["train.steps=3", "train.save_every=2"]
    assert train(tmp_path, *steps, "train.steps=1").returncode == 0
    done = train(tmp_path, *steps, *TWO_RANKS, preexec_fn=small_files)
    assert_user_error(done, "step_00000002 could not be written: [Errno 27]", "larger files than", "continues from")
    assert "GB are free" not in done.stderr
    assert checkpoints(tmp_path) == ["step_00000001"]
    assert not (tmp_path / "checkpoints/step_00000002").exists()  # it would only take room
    done = train(tmp_path, *steps)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 1" in done.stderr


@pytest.mark.slow
def test_full_disk_during_the_export(tmp_path):
    assert train(tmp_path, "train.steps=1").returncode == 0
    done = train(tmp_path, "train.steps=1", preexec_fn=small_files)  # nothing is left to do but the export
    assert_user_error(done, "hf could not be written", "File too large")
    assert (tmp_path / "hf/model.safetensors").is_file()
