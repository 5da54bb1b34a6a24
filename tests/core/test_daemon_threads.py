"""Work that blocks has a thread of its own, holds up no other work, and not the end of the program."""

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from megatron_opd.core.daemon_threads import started
from megatron_opd.core.event_loop import Loop

PATIENT_S = 300.0


@pytest.fixture
def loop():
    made = Loop("test")
    yield made
    made.close()


def test_pieces_that_hang_hold_up_no_other(loop):
    free = threading.Event()

    async def hang():
        await asyncio.wait_for(asyncio.to_thread(free.wait, PATIENT_S), 0.01)

    async def all_of_them():
        found = await asyncio.gather(*(hang() for _ in range(70)), return_exceptions=True)
        return found, await asyncio.to_thread(divmod, 47, 5)

    try:
        found, other = loop.run(all_of_them(), PATIENT_S)
    finally:
        free.set()
    assert {type(one) for one in found} == {TimeoutError}
    assert other == (9, 2)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError("odd"), "OSError('odd')"),
        (StopIteration(4), "RuntimeError('StopIteration(4)')"),
        (SystemExit(5), "RuntimeError('SystemExit(5)')"),
    ],
)
def test_what_is_raised(loop, raised, expected):
    def fail():
        raise raised

    async def awaited():
        return await asyncio.gather(asyncio.to_thread(fail), return_exceptions=True)

    assert repr(loop.run(awaited(), PATIENT_S)) == f"[{expected}]"
    assert repr(started(fail).exception(PATIENT_S)) == expected


def test_the_end_of_a_program_does_not_wait():
    program = (
        "import asyncio, time\n"
        "from megatron_opd.core.event_loop import Loop\n"
        "loop = Loop()\n"
        f"loop.start(asyncio.to_thread(time.sleep, {PATIENT_S}))\n"
        "time.sleep(0.1)\n"
        "loop.close()\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], timeout=2 * PATIENT_S, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - began < PATIENT_S
