"""The life of one rank, around the run itself: signals, its launcher, and what it says when it fails."""

from __future__ import annotations

import atexit
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable

from megatron_opd.core import causes, lifeline, preemption
from megatron_opd.core.last_words import Teller
from megatron_opd.core.parallel import PeerError, lost_peer

PEER_FAILED = 3
"""Exit code of a rank that stops only because another one failed."""
_PLACE = re.compile(r"^\[[^]]*\] ")
"""Where in gloo's source an error comes from."""
_GRACE_S = 10.0
"""How long a rank that stops because of another one stays: launchers end everybody when the first rank exits, and the
rank that failed should be heard first."""


def live(run: Callable[[preemption.Notice], None]) -> int:
    """`run` to its end; returns the exit code.

    A failure is told to the launcher, which has the last word. Where there is none of ours, it is printed, and errors
    that nobody has foreseen are raised.
    """
    lifeline.end_with_parent()
    teller = Teller()
    # Python would notice a signal only after the collective that it waits in; the default action ends it at once.
    # Nothing is lost: what is saved is complete, and what is being saved is not a checkpoint yet.
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    notice = preemption.Notice(preemption.warnings())
    try:
        run(notice)
    except preemption.Preempted as preempted:
        if teller.rank:
            return 0
        print(f"making room; {preempted}", file=sys.stderr, flush=True)
        return _after_the_others(preemption.EXIT_CODE)  # which launchers take for a failure of this rank
    except BrokenPipeError:  # nobody reads any more what rank 0 writes
        raise
    except Exception as error:
        return _fail(error, teller)
    finally:
        notice.close()
    return 0


def _fail(error: Exception, teller: Teller) -> int:
    _forget_compile_times()
    if isinstance(error, PeerError):
        teller.tell(str(error), is_lost=True)
        return _after_the_others(PEER_FAILED)
    said = causes.foreseen(error)
    if said is None and isinstance(error, RuntimeError) and lost_peer(error):
        teller.tell(_PLACE.sub("", str(error).splitlines()[0]), is_lost=True)
        _after_the_others(PEER_FAILED)  # who ends this rank now also says what happened to the other
        _print(f"rank {teller.rank} lost another rank: {error}", teller)
        return PEER_FAILED
    if said is None and not teller.is_heard:
        raise error
    trace = "" if said is not None else "".join(traceback.format_exception(error))
    said = said if said is not None else f"{type(error).__name__}: {error}"
    teller.tell(said, trace=trace)
    _print(f"{said}\n{trace}".strip(), teller)
    return 1


def _print(said: str, teller: Teller) -> None:
    """For its own log; rank 0 has none, and leaves the terminal to a launcher that listens."""
    if teller.rank or not teller.is_heard:
        print(f"error: {said}", file=sys.stderr, flush=True)


def _forget_compile_times() -> None:
    """torch logs how long it has compiled when the process ends, and imports a package for that. A rank that fails for
    want of files cannot, and would leave a second message behind its own."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    atexit.unregister(getattr(dynamo, "dump_compile_times", None))


def _after_the_others(code: int) -> int:
    time.sleep(_GRACE_S)
    return code
