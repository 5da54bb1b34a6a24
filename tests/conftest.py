"""Fixtures for tests that need several ranks, and what is done about the time of tests (`durations.py`)."""

import os
import signal

import pytest
import torch
import warm
from durations import pytest_addoption, pytest_collection_modifyitems, pytest_terminal_summary  # noqa: F401
from ranks import Ranks

if not torch.cuda.is_available():
    # Triton kernels run in its interpreter then. It must be told before it is imported, which Megatron does, too.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a path that does not exist can have the form of a hub's name
torch.set_num_threads(1)
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # as a shell's background jobs and nohup do, and then all children
        signal.signal(number, handler)


def pytest_configure(config):
    """A bare GPU machine may lack pytest-timeout: its marker is then known all the same, and without effect."""
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): pytest-timeout is not installed, so there is no limit")


@pytest.fixture(scope="session")
def ranks():
    """Rank processes that live as long as the session: `ranks.run(2, fn, ...)`."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session", autouse=True)
def _no_process_is_left():
    """The warm process and its forks end with the session."""
    yield
    warm.close()
