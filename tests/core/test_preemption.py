"""Warnings: which signals are some, and what a process does about them. Whole runs: tests/e2e and tests/slurm."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_opd.config.file import ConfigError, load
from megatron_opd.core.preemption import Notice, Preempted, warnings
from megatron_opd.launch import local
from megatron_opd.launch.rank_processes import Ranks

CONFIG = Path(__file__).resolve().parents[2] / "examples/quickstart.yaml"


@pytest.fixture
def as_before():
    numbers = (signal.SIGUSR1, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def test_sigterm_is_a_warning_of_slurm_only():
    both = (signal.SIGUSR1, signal.SIGTERM)
    assert warnings({"RANK": "0"}) == (signal.SIGUSR1,)
    assert warnings({"SLURM_PROCID": "0", "RANK": "0"}) == both
    assert warnings({"SLURM_PROCID": "0", "RANK": "0", "TORCHELASTIC_RUN_ID": "none"}) == (signal.SIGUSR1,)
    assert warnings({"SLURM_PROCID": "0", "RANK": "0", "MEGATRON_OPD_LAUNCHER": "1"}) == (signal.SIGUSR1,)


def test_a_notice_is_taken_and_later_ones_do_no_harm(as_before):
    notice = Notice((signal.SIGUSR1,))
    assert not notice.asked
    os.kill(os.getpid(), signal.SIGUSR1)
    assert notice.asked
    notice.close()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN


def test_restarts_are_not_negative():
    with pytest.raises(ConfigError, match=r"run\.max_restarts must not be negative, but is -1"):
        load(CONFIG, ["run.max_restarts=-1"])


def test_a_server_that_has_ended_does_not_keep_a_warning_from_the_ranks(tmp_path):
    server = subprocess.Popen(["true"])
    ranks = Ranks(["-c", "import time; time.sleep(3600)"], 1, logs=tmp_path)
    warning = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        deadline = time.monotonic() + 120
        while psutil.Process(server.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.01)
        with local._passing_warnings_on(ranks):
            warning.start()
            assert ranks.run()[0].code == -signal.SIGUSR1
    finally:
        warning.cancel()
        server.wait(120)


def test_a_warning_before_there_are_ranks_ends_the_launcher(tmp_path):
    ranks = Ranks([], 1, logs=tmp_path)
    with pytest.raises(Preempted), local._passing_warnings_on(ranks):
        signal.raise_signal(signal.SIGUSR1)
