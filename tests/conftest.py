"""Fixtures for tests that need several ranks, and what is done about the time of tests (`durations.py`)."""

import signal

import pytest
import torch
import warm
from durations import pytest_addoption, pytest_collection_modifyitems, pytest_terminal_summary  # noqa: F401
from ranks import Ranks

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs do, whose children then do so too
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
