"""The rank that made a run stop, and the reason: one message from exit codes and the messages of ranks."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from megatron_opd.core import causes, watchdog
from megatron_opd.core.last_words import Words
from megatron_opd.launch.one_rank import PEER_FAILED
from megatron_opd.launch.rank_processes import Failure

_LOG_LINES = 20
_SIGNALS = {
    -signal.SIGBUS: " (a file that it had mapped was cut, or the disk or /dev/shm is full)",
    -signal.SIGXCPU: " (its limit of processor time, `ulimit -t`)",
    -signal.SIGXFSZ: " (its limit of the size of files, `ulimit -f`)",
}
_KILLED = {
    None: " (did this machine run out of memory?)",
    True: " (the kernel killed a process meanwhile, because memory ran out)",
    False: " (somebody sent it: memory did not run out)",
}


def explain(
    failures: Mapping[int, Failure],
    logs: Path,
    *,
    words: Mapping[int, Words] | None = None,
    by_kernel: bool | None = None,
    count: int = 0,
) -> str:
    """The message of a run of `count` ranks that ended like this. `logs` is where the stacks of stuck ranks are.

    `words` is what ranks have said; `by_kernel`, whether the kernel has killed for want of memory, None if unknown.
    """
    words = words or {}
    rank = min(failures, key=lambda rank: _innocence(rank, failures[rank], words.get(rank)))
    failure, said = failures[rank], words.get(rank)
    if said is not None and not said.is_lost:
        lines = [said.said, f"rank {rank} {causes.ended(1 if failure.is_ours else failure.code)}; the run has stopped"]
        lines += _end_of("where it was:", said.trace)
    elif waiting := _who_did_not_get_on(failures, words, count):
        lines = [f"{waiting}; the run has stopped"]
    else:
        lines = [f"rank {rank} {causes.ended(failure.code)}{_hint(failure, by_kernel)}; the run has stopped"]
        if failure.log is not None and failure.log.is_file():
            lines += _end_of(f"the end of {failure.log}:", failure.log.read_text(errors="replace"))
    if stuck := watchdog.stacks(logs):
        lines.append(f"where ranks were when the run did not get on: {', '.join(map(str, stuck))}")
    return "\n".join(lines)


def keep_trace(words: Mapping[int, Words], logs: Path) -> None:
    """Write where rank 0 was in the program to its log, which only an error that nobody has foreseen gives it."""
    if 0 in words and words[0].trace:
        with suppress(OSError):
            logs.mkdir(parents=True, exist_ok=True)
            (logs / "rank-0.log").write_text(words[0].trace)


def _innocence(rank: int, failure: Failure, said: Words | None) -> tuple[bool, bool, bool, float, int]:
    """The smallest is the one that failed first of itself. A rank that a signal has ended is what the others failed
    of, and says nothing. One that has said why it ends may be ended before it does."""
    has_failed = said is not None and not said.is_lost
    when = said.when if said is not None and has_failed else failure.when
    is_consequence = not has_failed and (failure.code == PEER_FAILED or said is not None)
    return failure.is_ours and not has_failed, is_consequence, failure.code >= 0 or failure.is_ours, when, rank


def _who_did_not_get_on(failures: Mapping[int, Failure], words: Mapping[int, Words], count: int) -> str:
    """Where every rank that failed by itself has only lost others: who those others are, as far as it shows."""
    lost = sorted(rank for rank, said in words.items() if said.is_lost)
    if not lost or any(not failure.is_ours and failure.code != PEER_FAILED for failure in failures.values()):
        return ""
    because = f"{_names(lost)} waited for more ({words[lost[0]].said})"
    if gone := [rank for rank in range(count) if rank not in failures]:
        return f"{_names(gone)} ended with exit code 0 before the run was over: {because}"
    if silent := [rank for rank in sorted(failures) if failures[rank].is_ours and rank not in words]:
        return f"{_names(silent)} did not get on: {because}, as long as run.timeout_s says"
    return f"{_names(lost)} lost another rank: {words[lost[0]].said}"


def _names(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _hint(failure: Failure, by_kernel: bool | None) -> str:
    if failure.is_ours:
        return ""
    return _KILLED[by_kernel] if failure.code == -signal.SIGKILL else _SIGNALS.get(failure.code, "")


def _end_of(title: str, text: str) -> list[str]:
    lines = text.splitlines()[-_LOG_LINES:]
    return [title, *lines] if lines else []
