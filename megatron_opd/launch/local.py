"""From a config to running processes. `plan` is data; the local launcher, `check` and Slurm scripts read it."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_opd.config import Config
from megatron_opd.core import preemption, run_dir, watchdog
from megatron_opd.sglang import serve
from megatron_opd.sglang.keeper import Keeper, kept

PEER_FAILED = 3
"""Exit code of a rank that stops only because another one failed."""
_LOG_LINES = 20
_PR_SET_PDEATHSIG = 1


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


def is_worker() -> bool:
    """Whether torchrun or srun has started this process as a rank. Maps srun's names to torch's."""
    if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ.setdefault("RANK", os.environ["SLURM_PROCID"])
        os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_LOCALID"])
        os.environ.setdefault("WORLD_SIZE", os.environ["SLURM_STEP_NUM_TASKS"])
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def end_with_parent() -> None:
    """Have the kernel end this rank when its launcher dies without a word (SIGKILL). Only Linux can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def launch(config: Config, arguments: Sequence[str], *, max_restarts: int = 0) -> int:
    """Run the config's servers and the trainer's ranks on this machine and wait; returns an exit code.

    After a failure all of it is started again, up to `max_restarts` times: the ranks go on from the newest checkpoint.
    SIGUSR1 is passed on to the ranks, which save and leave; the exit code is then preemption.EXIT_CODE.
    Raises ValueError when another run has the directory, before anything of that is touched.
    """
    with run_dir.claimed(config.run.dir):
        pass  # rank 0 claims it for good
    for left in range(max_restarts, -1, -1):
        try:
            with _passing_warnings_on():
                code = _attempt(config, arguments, left)
        except preemption.Preempted:
            return preemption.EXIT_CODE
        if code != 1 or not left:
            break
        say(f"starting again ({left - 1} more time(s) by run.max_restarts): {run_dir.how_to_continue(config.run.dir)}")
    return code


@contextmanager
def _passing_warnings_on() -> Iterator[None]:
    """SIGUSR1 goes on to the ranks; raises Preempted when there are none yet."""

    def pass_on(*_: object) -> None:
        ranks = [child for child in psutil.Process().children() if _is_rank(child)]
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):  # just ended
                rank.send_signal(signal.SIGUSR1)
        if not ranks:
            raise preemption.Preempted

    before = signal.signal(signal.SIGUSR1, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _is_rank(child: psutil.Process) -> bool:
    """Nothing can be read of a server that has ended and is not waited for yet."""
    try:
        return "RANK" in child.environ()
    except psutil.Error:
        return False


def _attempt(config: Config, arguments: Sequence[str], restarts: int) -> int:
    """Servers and ranks once, to their end. Servers that end before are started again, `restarts` times.

    Rank 0 writes to this terminal; the others write to <run.dir>/logs/, and the end of the log of a rank that failed
    by itself is shown. When one rank fails, the others are ended.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    *_, trainer = plan(config, arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores; more threads only get in each other's way
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it has to say is said below
    logs = run_dir.make(config.run.dir) / run_dir.LOGS
    logs.mkdir(exist_ok=True)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=trainer.ranks,
        run_id=time.strftime("%Y%m%d-%H%M%S"),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=dict.fromkeys(range(1, trainer.ranks), Std.ALL)),
    )
    module, *rest = trainer.command[2:]
    ranks = "1 rank" if trainer.ranks == 1 else f"{trainer.ranks} ranks"
    try:
        with (
            serve.running(config, say=say, beside_ranks=True) as servers,
            kept(Keeper(servers, restarts=restarts, say=say)),
        ):
            say(f"starting {ranks}; this takes some seconds")
            elastic_launch(settings, sys.executable)("-m", module, *rest)
    except ChildFailedError as error:
        _mend_terminal()
        if {failure.exitcode for failure in error.failures.values()} & {preemption.EXIT_CODE, -signal.SIGUSR1}:
            return preemption.EXIT_CODE
        print(_explain(error.failures, logs), file=sys.stderr)
        return 1
    except (SignalException, KeyboardInterrupt) as error:
        _mend_terminal()
        print(f"error: interrupted; {run_dir.how_to_continue(config.run.dir)}", file=sys.stderr)
        return 128 + int(getattr(error, "sigval", signal.SIGINT))  # as shells have it
    return 0


def say(message: str) -> None:
    """A line of progress, while there is no rank yet that could log it."""
    print(f"{time.strftime('%H:%M:%S')}  {message}", file=sys.stderr, flush=True)


def _mend_terminal() -> None:
    """Show the cursor and begin a line: rank 0 may have been ended in the middle of its progress bar."""
    if sys.stderr.isatty():
        print("\x1b[?25h", file=sys.stderr)


def _explain(failures: Mapping[int, Any], logs: Path) -> str:
    """Which rank failed first of itself, and the end of its log unless it wrote to this terminal (rank 0)."""

    def suspicion(rank: int) -> tuple[bool, bool, float, int]:
        code = failures[rank].exitcode
        # SIGTERM is how the launcher ends the others; a rank killed by another signal is what they failed of.
        return code in (PEER_FAILED, -signal.SIGTERM), code >= 0, failures[rank].timestamp, rank

    rank = min(failures, key=suspicion)
    code = failures[rank].exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    hint = " (did this machine run out of memory?)" if code == -signal.SIGKILL else ""
    said = [f"rank {rank} {how}{hint}; the run has stopped"]
    if rank > 0:
        newest = max(logs.glob(f"*/attempt_0/{rank}/stderr.log"), key=lambda path: path.stat().st_mtime, default=None)
        lines = newest.read_text(errors="replace").splitlines()[-_LOG_LINES:] if newest else []
        said += [f"the end of {newest}:", *lines] if lines else []
    if stuck := watchdog.stacks(logs):
        said.append(f"where ranks were when the run did not get on: {', '.join(map(str, stuck))}")
    return "\n".join(said)
