"""From a config to running processes. `plan` is data; the local launcher, `check` and Slurm scripts read it."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

from megatron_opd.config import Config
from megatron_opd.core import last_words, preemption, rendezvous, run_dir
from megatron_opd.launch import culprit, oom
from megatron_opd.launch.interruption import mend_terminal, until_interrupted
from megatron_opd.launch.rank_processes import Ranks, Start, spawn
from megatron_opd.sglang import process, serve
from megatron_opd.sglang.keeper import Keeper, kept
from megatron_opd.tracking import train_log

_Servers = Callable[[], AbstractContextManager[list[process.Server]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A program of the run and how many ranks of it there are."""

    name: str
    command: tuple[str, ...]
    ranks: int
    served: serve.Served | None = None
    """The model, of a process that is servers."""

    def __str__(self) -> str:
        where = " on the trainer's GPUs" if self.is_colocated else ""
        return f"{self.name}: {self.ranks} rank{'s' if self.ranks > 1 else ''}{where} of `{shlex.join(self.command)}`"

    @property
    def is_colocated(self) -> bool:
        """Whether it takes no GPUs of its own."""
        return self.served is not None and self.served.servers.colocated


def plan(config: Config, arguments: Sequence[str]) -> list[Process]:
    """The processes of a run; `arguments` are the config file and overrides as the user gave them."""
    servers = [
        Process(
            name=f"SGLang servers for {served.name}",
            command=("sglang.launch_server", "--model-path", served.model, *served.arguments, *served.servers.args),
            ranks=served.servers.count * served.servers.tensor,
            served=served,
        )
        for served in serve.to_start(serve.needed(config))
    ]
    return [
        *servers,
        Process(
            name="trainer",
            command=("python", "-m", "megatron_opd", "train", *arguments),
            ranks=config.parallel.world_size,
        ),
    ]


def not_here(processes: Sequence[Process]) -> list[str]:
    """Interpreters that servers would be started with, and that this machine does not have, a line each."""
    ours = [planned.served for planned in processes if planned.served]
    found = [(served.setting, process.without_interpreter(served.servers)) for served in ours]
    return [f"{setting}.python: {missing}" for setting, missing in found if missing]


def launch(config: Config, arguments: Sequence[str], *, max_restarts: int = 0, start: Start = spawn) -> int:
    """Run the config's servers and the trainer's ranks on this machine and wait; returns an exit code.

    After a failure all of it is started again, up to `max_restarts` times: the ranks go on from the newest checkpoint.
    SIGUSR1 is passed on to the ranks, which save and leave; the exit code is then preemption.EXIT_CODE. Other signals
    end the run, as `until_interrupted` does. `start` starts a rank. Raises ValueError when another run has the
    directory, before anything of that is touched.
    """
    with run_dir.claimed(config.run.dir):
        pass  # rank 0 claims it for good
    tell = partial(train_log.say, config.run.dir)
    servers = partial(serve.running, config, say=tell, beside_ranks=True)

    def attempts() -> int:
        trainer, code = plan(config, arguments)[-1], 1
        for left in range(max_restarts, -1, -1):
            code = _attempt(config.run.dir, trainer, servers, restarts=left, start=start)
            if code != 1 or not left:
                break
            how = run_dir.how_to_continue(config.run.dir)
            tell(f"starting again ({left - 1} more time(s) by run.max_restarts): {how}")
        return code

    return until_interrupted(config.run.dir, attempts)


@contextmanager
def _passing_warnings_on(ranks: Ranks) -> Iterator[None]:
    """SIGUSR1 goes on to the ranks; raises Preempted when there are none yet."""

    def pass_on(*_: object) -> None:
        if not ranks.has_begun:
            raise preemption.Preempted
        ranks.send(signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _attempt(where: str, trainer: Process, servers: _Servers, *, restarts: int, start: Start) -> int:
    """Servers and ranks once, to their end, in the run directory `where`. `servers` starts servers for a `with` block;
    those that end before are started again, `restarts` times.

    Rank 0 writes to this terminal, the others to <run.dir>/logs/<start>/. When one rank fails, the others are ended,
    and the last message says which one failed by itself, and why.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores; more threads only get in each other's way
    logs = run_dir.make(where) / run_dir.LOGS
    logs.mkdir(exist_ok=True)
    tell = partial(train_log.say, where)
    number = "1 rank" if trainer.ranks == 1 else f"{trainer.ranks} ranks"
    kills = oom.Kills()
    with rendezvous.private_store() as store, last_words.collected(trainer.ranks) as (listener, heard):
        ranks = Ranks(
            trainer.command[1:],
            trainer.ranks,
            logs=logs / time.strftime("%Y%m%d-%H%M%S"),
            environment={**store, **listener},
            start=start,
        )
        with (
            _passing_warnings_on(ranks),
            servers() as started,
            kept(Keeper(started, restarts=restarts, say=tell)),
        ):
            tell(f"starting {number}; this takes some seconds")
            failures = ranks.run()
        words = heard()
    if not failures:
        return 0
    mend_terminal()
    if {failure.code for failure in failures.values()} & {preemption.EXIT_CODE, -signal.SIGUSR1}:
        return preemption.EXIT_CODE
    culprit.keep_trace(words, ranks.logs)
    why = culprit.explain(failures, logs, words=words, by_kernel=kills.since(), count=trainer.ranks)
    print(f"error: {why}", file=sys.stderr, flush=True)
    return 1


def say(message: str) -> None:
    """A line of progress, while there is no rank yet that could log it."""
    print(train_log.for_console(message), file=sys.stderr, flush=True)
