"""Signals to a run: at random times, at points of the code, twice in a row, and while it resumes."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from faults import judge
from faults.kind import Played, kind
from faults.points import POINTS, draw_point
from faults.stage import Ended, Running, Stage, reference

STOPS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
"""Signals that ask a launcher to end, and its exit code then."""
_KILLED = -signal.SIGKILL
_DONE = "done; for tables"
"""The last line of a run that has ended well."""


@kind
def launcher_is_signalled(rng: random.Random, directory: Path) -> Played:
    """SIGTERM, SIGINT or SIGHUP to the launcher at a random time."""
    return _signalled(rng, directory, number=rng.choice(list(STOPS)), ranks=2)


@kind
def lone_rank_is_signalled(rng: random.Random, directory: Path) -> Played:
    """SIGTERM, SIGINT or SIGHUP to a run without a launcher, at a random time."""
    return _signalled(rng, directory, number=rng.choice(list(STOPS)), ranks=1)


@kind
def launcher_is_killed(rng: random.Random, directory: Path) -> Played:
    """SIGKILL to the launcher at a random time: the ranks end by themselves."""
    return _signalled(rng, directory, number=signal.SIGKILL, ranks=2)


@kind
def lone_rank_is_killed(rng: random.Random, directory: Path) -> Played:
    """SIGKILL to a run without a launcher, at a random time."""
    return _signalled(rng, directory, number=signal.SIGKILL, ranks=1)


def _signalled(rng: random.Random, directory: Path, *, number: signal.Signals, ranks: int) -> Played:
    stage = Stage(ranks, directory)
    at = rng.uniform(0, reference(ranks).seconds)
    played = Played({"signal": number.name, "at_s": round(at, 3), "ranks": ranks})
    how = _met(played, stage, at, lambda running: running.process.send_signal(number))
    if how.code == 0 or _DONE in how.printed:
        played.reached = False  # it was ending already
    if played.reached:
        played.wrong = _after(stage, how, number)
    return played


@kind
def rank_is_signalled(rng: random.Random, directory: Path) -> Played:
    """SIGKILL, SIGTERM, SIGSEGV or SIGBUS to one of two ranks at a random time: the launcher names it."""
    number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGBUS])
    rank = rng.randrange(2)
    stage = Stage(2, directory)
    at = rng.uniform(0, reference(2).seconds)
    played = Played({"signal": number.name, "rank": rank, "at_s": round(at, 3)})
    how = _met(played, stage, at, lambda running: _to_rank(played, stage, running, rank, number))
    return _of_two(played, stage, how, f"rank {rank} was ended by {number.name}")


@kind
def rank_is_stopped(rng: random.Random, directory: Path) -> Played:
    """SIGSTOP to one of two ranks: run.timeout_s ends the run and the message names it."""
    rank = rng.randrange(2)
    stage = Stage(2, directory)
    played = Played({"rank": rank, "after_step": rng.randrange(1, 4)})
    running = stage.start("run.timeout_s=10")
    until = time.monotonic() + 240
    while not _has_logged(stage, played.facts["after_step"]) and running.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    _to_rank(played, stage, running, rank, signal.SIGSTOP)
    return _of_two(played, stage, stage.end(running), "")


@kind
def signal_at_a_point(rng: random.Random, directory: Path) -> Played:
    """A signal that a lone rank gets at a chosen call of a chosen function."""
    number = rng.choice([*STOPS, signal.SIGKILL])
    stage = Stage(1, directory)
    point = draw_point(rng, POINTS)
    played = Played({"signal": number.name, **point})
    how = stage.run(fault={"rank": "0", **point, "do": {"signal": int(number)}})
    played.reached = stage.happened() and how.code != 0
    if played.reached:
        played.wrong = _after(stage, how, number)
    return played


@kind
def kill_at_a_point_of_a_rank(rng: random.Random, directory: Path) -> Played:
    """SIGKILL of one of two ranks at a chosen call of a chosen function: the other one waits in a collective."""
    rank, stage = rng.randrange(2), Stage(2, directory)
    point = draw_point(rng, POINTS)
    played = Played({"rank": rank, **point})
    how = stage.run(fault={"rank": str(rank), **point, "do": {"signal": int(signal.SIGKILL)}})
    played.reached = stage.happened()
    return _of_two(played, stage, how, f"rank {rank} was ended by SIGKILL")


@kind
def two_signals(rng: random.Random, directory: Path) -> Played:
    """Two signals to the launcher within half a second."""
    first, second = rng.choice(list(STOPS)), rng.choice([*STOPS, signal.SIGKILL])
    gap = rng.choice([0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.5)])
    at = rng.uniform(0, reference(2).seconds)
    stage = Stage(2, directory)
    played = Played({"signals": [first.name, second.name], "at_s": round(at, 3), "gap_s": round(gap, 4)})

    def send_both(running: Running) -> None:
        running.process.send_signal(first)
        time.sleep(gap)
        running.process.send_signal(second)

    how = _met(played, stage, at, send_both)
    played.reached &= how.code != 0
    if played.reached:
        played.wrong = _after(stage, how, first, second)
    return played


@kind
def killed_again_while_resuming(rng: random.Random, directory: Path) -> Played:
    """A lone rank is killed at a random time, and so are one to three of the runs that resume it."""
    stage, whole = Stage(1, directory), reference(1)
    times = [
        rng.uniform(0.2, 1) * whole.seconds,
        *(rng.uniform(0, 0.9) * whole.seconds for _ in range(rng.randint(1, 3))),
    ]
    played = Played({"at_s": [round(at, 3) for at in times]}, reached=False)
    for at in times:
        one = Played({})
        how = _met(one, stage, at, lambda running: running.process.kill())
        played.reached |= one.reached and how.code == _KILLED
        played.wrong += [] if how.code in (0, _KILLED) else judge.ended(how, codes=(_KILLED,))
    if played.reached:
        played.wrong += judge.all_gone(stage) + judge.continues(stage, whole)
    return played


@kind
def power_cut(rng: random.Random, directory: Path) -> Played:
    """All processes of a run on two ranks are killed at once, at a random time."""
    stage, at = Stage(2, directory), rng.uniform(0, reference(2).seconds)
    played = Played({"at_s": round(at, 3)})
    how = _met(played, stage, at, lambda _: [one.kill() for one in stage.processes()])
    played.reached &= how.code == _KILLED
    if played.reached:
        played.wrong = judge.all_gone(stage) + judge.continues(stage, reference(2))
    return played


def _met(played: Played, stage: Stage, at: float, happen: Callable[[Running], object]) -> Ended:
    """The end of a run to which something happens after `at` seconds; reached where the run goes on until then."""
    running = stage.start()
    time.sleep(at)
    played.reached = running.is_alive()
    happen(running)
    return stage.end(running)


def _to_rank(played: Played, stage: Stage, running: Running, rank: int, number: signal.Signals) -> None:
    """A signal to a rank, if it is there yet."""
    found = stage.rank(rank)
    played.reached = found is not None and running.is_alive()
    if found is not None and played.reached:
        found.send_signal(number)


def _of_two(played: Played, stage: Stage, how: Ended, said: str) -> Played:
    """Judge the end of a launcher by what happened to one of its two ranks; it has said so, among other things."""
    played.reached &= how.code != 0
    if played.reached:
        played.wrong = judge.ended(how, codes=(1,)) + judge.one_message(how)
        played.wrong += [] if said in how.printed else [f"it does not say {said!r}"]
        played.wrong += judge.all_gone(stage) + judge.continues(stage, reference(2))
    return played


def _after(stage: Stage, how: Ended, *numbers: signal.Signals) -> list[str]:
    """Complaints about an end by signals to the program itself."""
    codes = {STOPS.get(number, _KILLED) for number in numbers}
    codes |= {-number for number in numbers[1:]}  # a second one may end a program that is ending already
    wrong = judge.ended(how, codes=tuple(codes))
    wrong += [] if how.code == _KILLED else judge.one_message(how)
    if how.code in {-number for number in numbers} and _ends_without_a_word(stage):
        wrong = []
    return wrong + judge.all_gone(stage) + judge.continues(stage, reference(stage.ranks))


def _ends_without_a_word(stage: Stage) -> bool:
    """A rank alone leaves the message to a launcher, which it does not have here. So does a program that has not begun:
    the interpreter and its imports know no signals of ours."""
    return stage.ranks == 1 or not stage.run_dir.exists()


def _has_logged(stage: Stage, step: int) -> bool:
    log = stage.run_dir / "train.log"
    return log.is_file() and f"step {step}/" in log.read_text()
