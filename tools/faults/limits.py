"""Machines that are full: disks, open files, memory, processes, and a file system that refuses."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

from faults import judge
from faults.kind import Played, kind
from faults.points import FILE_POINTS, draw_point
from faults.stage import Stage, reference

_REFUSALS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.ENFILE, errno.EMFILE, errno.ENOMEM, errno.EACCES]


@kind
def disk_is_full_at_a_size(rng: random.Random, directory: Path) -> Played:
    """No file can grow beyond a random size, from nothing to more than a checkpoint."""
    size = rng.choice([0, rng.randrange(1 << 13), rng.randrange(1 << 13, 1 << 15), rng.randrange(1 << 13, 1 << 20)])
    return _limited(rng, directory, ["RLIMIT_FSIZE", size])


@kind
def few_open_files(rng: random.Random, directory: Path) -> Played:
    """A process may hold a few files open only."""
    return _limited(rng, directory, ["RLIMIT_NOFILE", rng.choice([rng.randrange(3, 12), rng.randrange(12, 60)])])


@kind
def little_memory(rng: random.Random, directory: Path) -> Played:
    """A process may grow by a few megabytes only."""
    return _limited(rng, directory, ["RLIMIT_AS", rng.randrange(1 << 18, 1 << rng.randint(20, 28))])


def _limited(rng: random.Random, directory: Path, limit: list[Any]) -> Played:
    ranks = rng.choice([1, 1, 2])
    rank = "any" if ranks == 1 else str(rng.randrange(2))
    return _refused(Stage(ranks, directory), {"rank": rank, "limit": limit})


@kind
def file_system_refuses(rng: random.Random, directory: Path) -> Played:
    """One call for a file fails: no space, an input or output error, a quota, read-only, too many files."""
    number = rng.choice(_REFUSALS)
    return _refused(
        Stage(1, directory),
        {"rank": "0", **draw_point(rng, FILE_POINTS), "do": {"errno": number}},
        errno.errorcode[number],
    )


@kind
def no_more_threads(rng: random.Random, directory: Path) -> Played:
    """The operating system gives no thread, as at a limit of processes."""
    how = {"error": "RuntimeError", "text": "can't start new thread"}
    point = {"point": "threading:Thread.start", "call": rng.randint(1, 6)}
    return _refused(Stage(rng.choice([1, 2]), directory), {"rank": "any", **point, "do": how})


@kind
def no_more_processes(rng: random.Random, directory: Path) -> Played:
    """The launcher cannot start a rank."""
    point = {"point": "megatron_opd.launch.local:launch", "call": 1}
    number = rng.choice([errno.EAGAIN, errno.ENOMEM, errno.EMFILE])
    fault = {"rank": "launcher", **point, "do": {"errno": number}}
    return _refused(Stage(2, directory), fault, errno.errorcode[number])


@kind
def memory_error(rng: random.Random, directory: Path) -> Played:
    """Python or torch finds no memory in the middle of a step."""
    points = {
        "megatron_opd.trainer.experience:Experience.sample": 4,
        "megatron_opd.student.student:Student.step": 4,
        "megatron_opd.trainer.experience:Experience.score": 4,
        "torch.autograd:backward": 8,
    }
    how = rng.choice(
        [
            {"error": "MemoryError", "text": ""},
            {"error": "RuntimeError", "text": "[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes"},
        ]
    )
    ranks = rng.choice([1, 2])
    return _refused(Stage(ranks, directory), {"rank": str(rng.randrange(ranks)), **draw_point(rng, points), "do": how})


def _refused(stage: Stage, fault: dict[str, Any], called: str = "") -> Played:
    """The run ends with one message, or goes on as if nothing had happened where it can do without."""
    played = Played({**fault, "ranks": stage.ranks, "called": called})
    how = stage.run(fault=fault)
    played.reached = stage.happened()
    if not played.reached:
        return played
    played.wrong = judge.ended(how, codes=(0, 1)) + judge.all_gone(stage)
    if how.code == 0:
        played.wrong += judge.same_as(reference(stage.ranks), stage)
    else:
        played.wrong += judge.one_message(how) + judge.continues(stage, reference(stage.ranks))
    return played
