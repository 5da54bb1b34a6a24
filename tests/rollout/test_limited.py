"""What an environment may do wrong ends its own episode, and holds up nobody else's."""

import asyncio
import threading
import time

import pytest

from megatron_opd.rollout import limited
from megatron_opd.rollout.limited import EnvironmentThread, Trouble


@pytest.fixture
def thread():
    made = EnvironmentThread()
    yield made
    made.close()


async def returns(value):
    return value


async def raises(error):
    raise error


async def hangs():
    await asyncio.sleep(3600)


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no words")


def test_the_result(thread):
    assert asyncio.run(thread.run(returns(3), 60.0)) == 3


def test_the_line_that_raised_is_told(thread):
    with pytest.raises(Trouble, match=r"^ValueError: odd \(test_limited\.py, line \d+\)$"):
        asyncio.run(thread.run(raises(ValueError("odd")), 60.0))


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ValueError("odd"), "ValueError: odd"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (TimeoutError("its own"), "TimeoutError: its own"),
        (RuntimeError("x" * 5000), "RuntimeError: xxx"),
        (Unprintable(), "Unprintable"),
        (RecursionError("deep"), "RecursionError: deep"),
        (asyncio.CancelledError(), "cancelled itself"),
    ],
)
def test_whatever_it_raises_is_trouble_in_words(thread, error, why):
    with pytest.raises(Trouble, match=why) as caught:
        asyncio.run(thread.run(raises(error), 60.0))
    assert caught.value.kind == "failed"
    assert len(caught.value.why) < 400
    assert asyncio.run(thread.run(returns("still there"), 60.0)) == "still there"


@pytest.mark.parametrize("error", [SystemExit(4), KeyboardInterrupt("own")])
def test_a_task_of_one_that_ends_the_program_ends_no_other(thread, error):
    async def in_a_task():
        await asyncio.wait_for(raises(error), 60.0)

    async def both():
        other = asyncio.create_task(thread.run(asyncio.sleep(0.05, "the other"), 60.0))
        with pytest.raises(Trouble, match=type(error).__name__) as caught:
            await thread.run(in_a_task(), 60.0)
        return caught.value.kind, await other

    assert asyncio.run(both()) == ("failed", "the other")


def test_one_that_takes_too_long_is_cancelled(thread):
    cancelled = threading.Event()

    async def waits():
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()

    with pytest.raises(Trouble, match=r"longer than 0\.05 s") as caught:
        asyncio.run(thread.run(waits(), 0.05))
    assert caught.value.kind == "timeout"
    assert cancelled.wait(60)


def test_one_that_blocks_its_thread_is_left_behind(thread, monkeypatch):
    monkeypatch.setattr(limited, "_ALIVE_S", 0.05)
    free = threading.Event()

    async def blocks():
        free.wait(60)

    async def all_of_it():
        with pytest.raises(Trouble, match="longer"):
            await thread.run(blocks(), 0.05)
        return await thread.run(returns("the next one"), 60.0)

    try:
        assert asyncio.run(all_of_it()) == "the next one"
    finally:
        free.set()


def test_an_interrupt_of_the_caller_is_no_trouble(thread):
    async def interrupted():
        task = asyncio.create_task(thread.run(hangs(), 3600.0))
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())


def test_closing_does_not_wait_for_one_that_blocks(monkeypatch):
    monkeypatch.setattr("megatron_opd.core.event_loop._JOIN_S", 0.05)
    free, made = threading.Event(), EnvironmentThread()

    async def blocks():
        free.wait(60)

    made._loop.start(blocks())
    began = time.monotonic()
    made.close()
    free.set()
    assert time.monotonic() - began < 50
