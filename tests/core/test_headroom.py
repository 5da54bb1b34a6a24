"""A process without room for threads or open files says so, at once, instead of hanging or being aborted in torch."""

import os
import sys
import threading

import pytest
import warm

from megatron_opd.core import headroom


def test_a_look_leaves_nothing_behind():
    before = threading.active_count(), len(os.listdir("/dev/fd"))
    headroom.check()
    assert (threading.active_count(), len(os.listdir("/dev/fd"))) == before


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
@pytest.mark.parametrize("megabytes", [1, 40, 200])
def test_a_process_that_may_not_grow(megabytes):
    code = f"""
import resource
from pathlib import Path
from megatron_opd.core import headroom
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + ({megabytes} << 20), -1))
try:
    headroom.check()
except RuntimeError as error:
    print(error)
"""
    assert warm.run(["-c", code], env=dict(os.environ), timeout=300).stdout == "can't start new thread\n"


@pytest.mark.parametrize("free", [0, 9, 63])
def test_a_process_that_may_open_few_files(free):
    code = f"""
import os, resource
from megatron_opd.core import headroom
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) - 1 + {free}, hard))
for _ in range(2):
    try:
        headroom.check()
    except OSError as error:
        print(error.strerror)
"""
    assert warm.run(["-c", code], env=dict(os.environ), timeout=300).stdout == "Too many open files\n" * 2
