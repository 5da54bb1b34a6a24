"""A signal whose exception Python drops comes again, until somebody hears it."""

import signal

import program
import pytest
import warm

from megatron_opd.core import interrupts

PROGRAM = """
import signal, sys, time, weakref
from megatron_opd.core import interrupts
from megatron_opd.core.preemption import Preempted

class Thing:
    def __del__(self):
        if WHERE == "del":
            signal.raise_signal(NUMBER)

def called(_):
    if WHERE == "weak reference":
        signal.raise_signal(NUMBER)

def handler(number, _):
    raise Preempted if number == signal.SIGUSR1 else interrupts.Interrupted(number)

WHERE, NUMBER = sys.argv[1], int(sys.argv[2])
if KEEP:
    interrupts.keep()
if NUMBER != signal.SIGINT:
    signal.signal(NUMBER, handler)
thing = Thing()
reference = weakref.ref(thing, called)
try:
    del thing
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        time.sleep(0.01)
    print("lost")
except (KeyboardInterrupt, Preempted) as error:
    print("heard", type(error).__name__)
"""


def run(where, number, *, keep, wait_s):
    code = PROGRAM.replace("KEEP", str(keep)).replace("WAIT_S", str(wait_s))
    return warm.run(["-c", code, where, str(int(number))], env=program.environment(), timeout=program.PATIENCE_S)


@pytest.mark.parametrize("where", ["del", "weak reference"])
@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Interrupted"), (signal.SIGUSR1, "Preempted")],
)
def test_a_signal_in_a_callback_is_heard(where, number, name):
    done = run(where, number, keep=True, wait_s=program.PATIENCE_S)
    assert done.stdout.split() == ["heard", name], done.stderr
    assert done.stderr == ""


def test_python_alone_loses_it():
    done = run("del", signal.SIGINT, keep=False, wait_s=0.5)
    assert done.stdout.split() == ["lost"]
    assert "KeyboardInterrupt" in done.stderr


def test_other_errors_in_callbacks_are_printed_as_ever():
    code = "import weakref; from megatron_opd.core import interrupts; interrupts.keep(); thing = type('A', (), {})()"
    code += "; reference = weakref.ref(thing, lambda _: 1 / 0); del thing"
    done = warm.run(["-c", code], env=program.environment(), timeout=program.PATIENCE_S)
    assert "ZeroDivisionError" in done.stderr


def test_signals_in_a_block_are_heard_at_its_end_with_their_own_handlers():
    heard, numbers = [], (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in numbers}
    ours = [signal.getsignal(number) for number in numbers]
    try:
        with interrupts.deferred():
            for number in numbers:
                signal.raise_signal(number)
            assert heard == []
        assert heard == [*numbers]
        assert [signal.getsignal(number) for number in numbers] == ours
        with pytest.raises(KeyboardInterrupt):
            interrupted_in_a_block(heard)
        assert heard[-1] == "to its end"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted_in_a_block(heard):
    with interrupts.deferred():
        signal.raise_signal(signal.SIGINT)
        heard.append("to its end")
