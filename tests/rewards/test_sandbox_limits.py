"""Code in the sandbox cannot take the machine from the trainer: scheduling and the total size of files."""

import os

import pytest
from test_sandbox import GUARDS, HERE, PATIENT, needs, verdict

from megatron_opd.rewards.sandbox import SandboxLimits

SMALL = SandboxLimits(timeout_s=60.0, total_mb=4, file_mb=2)


@pytest.mark.parametrize(
    "change",
    [
        "os.nice(1)",
        "os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
        "os.setpriority(os.PRIO_USER, os.getuid(), 19)",
        "os.sched_setaffinity({pid}, [0])",
        "os.sched_setaffinity(0, [0])",
        "os.sched_setscheduler({pid}, os.SCHED_IDLE, os.sched_param(0))",
        "os.sched_setparam({pid}, os.sched_param(0))",
    ],
)
@needs("seccomp")
def test_scheduling_stays_as_it_is(change):
    before = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0), os.sched_getscheduler(0)
    found = verdict(f"import os\ndef add(): return {change.format(pid=os.getpid())}", "add()", limits=PATIENT)
    assert "PermissionError" in found.why
    assert (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0), os.sched_getscheduler(0)) == before


FILL = """
def add():
    for i in range(1000):
        with open(f'{i}', 'wb') as f: f.write(bytes(2**20))
        DELETE
    return 'wrote 1 GB'
"""


@pytest.mark.parametrize("guards", [GUARDS, ("seccomp",)], ids="+".join)
def test_the_files_together_are_bounded(guards):
    if not set(guards) <= set(HERE):
        pytest.skip("not on this kernel")
    assert not verdict(
        FILL.replace("DELETE", "import time; time.sleep(0.05)"), "add()", limits=SMALL, guards=guards
    ).passed


@needs("namespaces")
def test_files_that_are_deleted_while_open_count_too():
    keep = (
        "import os\nkept = []\ndef add():\n    for i in range(40):\n        kept.append(open('x', 'wb', buffering=0))\n"
    )
    keep += "        os.remove('x')\n        kept[-1].write(bytes(2**20))\n"
    keep += "        assert os.fstat(kept[-1].fileno()).st_size == 2**20\n"
    assert not verdict(keep, "add()", limits=SMALL).passed


def test_what_is_deleted_may_be_written_again():
    code = FILL.replace("DELETE", "__import__('os').remove(f'{i}')").replace("1000", "20")
    assert verdict(code, "assert add()", limits=SMALL).passed
