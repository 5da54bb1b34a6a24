"""A process without room for threads says so, at once, instead of hanging in torch."""

import os
import sys
import threading

import pytest
import warm

from megatron_opd.core import threads


def test_room_leaves_no_thread_behind():
    before = threading.active_count()
    threads.check_room()
    assert threading.active_count() == before


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
@pytest.mark.parametrize("megabytes", [1, 40, 200])
def test_a_process_that_may_not_grow(megabytes):
    code = f"""
import resource
from pathlib import Path
from megatron_opd.core import threads
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + ({megabytes} << 20), -1))
try:
    threads.check_room()
except RuntimeError as error:
    print(error)
"""
    assert warm.run(["-c", code], env=dict(os.environ), timeout=300).stdout == "can't start new thread\n"
