"""The SGLang servers of a run: which it needs, starting them, and how its ranks find them.

`train` started by hand starts them beside its ranks; `megatron-opd serve` starts them alone, in another job step or on
another machine. Whoever starts a server notes its address as a file in <run.dir>/servers and removes that when the
server ends; ranks look there for what the config gives no urls for. Servers whose urls are in the config are nobody's
to start or to end.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_opd.config import Config, RolloutConfig, RunConfig, ServersConfig
from megatron_opd.core import run_dir
from megatron_opd.core.whole_file import write_whole
from megatron_opd.models.architecture import read_limits
from megatron_opd.sglang import nccl, process
from megatron_opd.sglang.weights import fp8_weights
from megatron_opd.sglang.weights.group import LOOPBACK, own_address
from megatron_opd.sglang.weights.transports import way_of

ANYWHERE = "0.0.0.0"
"""The address of servers that other machines are to reach."""
ROLLOUT = "rollout"
"""The name of the student's servers."""
MARGIN = 8
"""Tokens of context that a server must have beyond the longest prompt and answer: SGLang keeps some for itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """One model of a run that is behind servers."""

    name: str
    """`rollout`, or `teacher-<name>`: in file names and messages."""
    setting: str
    """Where its ServersConfig is: `rollout.servers`."""
    servers: ServersConfig
    model: str
    longest: int
    """Longest prompt, with all that is behind it, that the config allows, and a margin; in tokens."""
    arguments: tuple[str, ...]
    """Of sglang.launch_server, as this use of the model needs."""
    is_local: bool = False
    """Whether they must be on the machine of rank 0, because their weights come no further."""

    @property
    def context(self) -> int:
        """Longest prompt and answer together that the run will ask about; reads the model's config.json."""
        return min(self.longest, read_limits(self.model)[1])


def needed(config: Config) -> list[Served]:
    """Every model of the config that is behind servers, started by us or not.

    Raises ValueError for a `rollout.sync` that cannot reach the servers.
    """
    found = []
    if config.rollout.is_served:
        found.append(
            Served(
                name=ROLLOUT,
                setting="rollout.servers",
                servers=_like_the_student(config.rollout.servers, config.student.dtype),
                model=config.student.model,
                longest=config.longest + MARGIN,
                arguments=_of_the_student(config.rollout.quantization, config.student.model),
                is_local=way_of(config.rollout).is_local,
            )
        )
    for i, teacher in enumerate(config.teachers):
        if teacher.is_served:
            hidden = ("--enable-return-hidden-states",) if teacher.carrier == "hidden" else ()
            found.append(
                Served(
                    name=f"teacher-{teacher.name}",
                    setting=f"teachers.{i}.servers",
                    servers=teacher.servers,
                    model=teacher.model,
                    longest=config.longest_scored + MARGIN,
                    arguments=hidden,
                )
            )
    return found


def _of_the_student(quantization: Literal["none", "fp8"], model: str) -> tuple[str, ...]:
    """Arguments of the student's servers, by how its weights come."""
    if quantization == "fp8":
        return fp8_weights.arguments()
    # A Megatron checkpoint has no weights that SGLang could read; the first sync brings them.
    return () if any(Path(model).glob("*.safetensors")) else ("--load-format", "dummy")


def _like_the_student(servers: ServersConfig, dtype: Literal["fp32", "bf16", "fp16"]) -> ServersConfig:
    """Samplers compute in the trainer's type: what differs between the two is noise in every loss."""
    return dataclasses.replace(servers, dtype=dtype) if servers.dtype == "auto" else servers


def to_start(found: Sequence[Served], only: Sequence[str] = ()) -> list[Served]:
    """Those without urls; with `only`, the named ones among them. Raises ValueError for an unknown name."""
    ours = [served for served in found if not served.servers.urls]
    if unknown := sorted(set(only) - {served.name for served in ours}):
        names = ", ".join(served.name for served in ours) or "none"
        raise ValueError(f"--only: this config starts no servers named {', '.join(unknown)}; it starts: {names}")
    return [served for served in ours if not only or served.name in only]


@contextmanager
def running(
    config: Config, *, say: Callable[[str], None], only: Sequence[str] = (), beside_ranks: bool = False
) -> Iterator[list[process.Server]]:
    """Start the servers that the config leaves to us, wait for them, and note them; end them with the block.

    `beside_ranks`: the trainer's ranks run on this machine too. Raises ValueError for servers that do not get ready,
    and for those that could not get the student's weights.
    """
    ours = to_start(needed(config), only)
    _check_gpus(ours, is_shared=beside_ranks or len(ours) > 1)
    if any(served.name == ROLLOUT for served in ours) and has_nccl_group(config.rollout):
        nccl.compare(nccl.own(), config.rollout.servers.python, setting="rollout.servers.python", say=say)
    notes = run_dir.make(config.run.dir) / run_dir.SERVERS
    logs = Path(config.run.dir) / run_dir.LOGS
    started: list[process.Server] = []
    noted: list[Path] = []
    try:
        groups = []
        for served in ours:
            notes.mkdir(exist_ok=True)
            for stale in notes.glob(f"{served.name}@{_machine()}-[0-9][0-9][0-9]"):  # of a start that was killed
                stale.unlink()
            group = process.start(
                served.servers,
                served.model,
                name=served.name,
                log_dir=logs,
                context=served.context,
                extra=served.arguments,
                sees_all=served.is_local,
            )
            started += group
            groups.append((served, group))
        for served, group in groups:
            say(f"starting {len(group)} SGLang server(s) for {served.name}, logs in {logs}")
        for served, group in groups:
            process.wait(group, served.servers, say=say)
            noted += [_note(notes, served.name, i, server.url) for i, server in enumerate(group)]
        yield started
    finally:
        for note in noted:
            note.unlink(missing_ok=True)
        process.stop(started)


def with_urls(config: Config) -> Config:
    """The config with the urls of the servers that somebody has started for it.

    Raises ValueError when there are none for a model that needs some.
    """
    notes = Path(config.run.dir) / run_dir.SERVERS
    found = {served.setting: _noted(served, notes) for served in to_start(needed(config))}
    rollout = config.rollout
    return dataclasses.replace(
        config,
        rollout=dataclasses.replace(rollout, servers=found.get("rollout.servers", rollout.servers)),
        teachers=[
            dataclasses.replace(teacher, servers=found.get(f"teachers.{i}.servers", teacher.servers))
            for i, teacher in enumerate(config.teachers)
        ],
    )


def _noted(served: Served, notes: Path) -> ServersConfig:
    """The settings of its servers, with the urls that are noted."""
    urls = _noted_urls(served.name, notes)
    if not urls:
        raise ValueError(
            f"{served.setting}: no servers for {served.name} are running; start them with `megatron-opd serve` and the"
            f" same config, or name yours in {served.setting}.urls"
        )
    return dataclasses.replace(served.servers, urls=urls)


def _noted_urls(name: str, notes: Path) -> list[str]:
    return [note.read_text().strip() for note in sorted(notes.glob(f"{name}@*"))]


def reaches_out(rollout: RolloutConfig, run: RunConfig) -> bool:
    """Whether the ranks send weights to servers on other machines, in a process group with them.

    False while no servers are noted: a rank that needs some says so itself.
    """
    if not rollout.is_served or not way_of(rollout).joins_servers:
        return False
    urls = rollout.servers.urls or _noted_urls(ROLLOUT, Path(run.dir) / run_dir.SERVERS)
    try:
        return bool(urls) and own_address(urls) != LOOPBACK
    except OSError:  # the name of a host is not known; whoever asks it says so
        return True


def has_nccl_group(rollout: RolloutConfig) -> bool:
    """Whether this machine's ranks may be in an NCCL group with the servers."""
    return rollout.is_served and way_of(rollout).joins_servers and torch.cuda.is_available()


def _check_gpus(ours: Sequence[Served], *, is_shared: bool) -> None:
    """Nobody's default is right when several programs share the GPUs of a machine; but colocated servers are where the
    trainer is, on the first ones."""
    if is_shared and torch.cuda.is_available():
        for served in ours:
            if not served.servers.gpus and not served.servers.colocated:
                raise ValueError(
                    f"{served.setting}.gpus: say which GPUs these servers take; the trainer's ranks on this machine"
                    " take one each, from 0 on"
                )


def _machine() -> str:
    """What Slurm calls this one, where it runs: several of its nodes may be on one host."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _note(notes: Path, name: str, i: int, url: str) -> Path:
    """One file a server, so that several machines can add theirs."""
    note = notes / f"{name}@{_machine()}-{i:03d}"
    for anywhere in (ANYWHERE, "[::]"):
        url = url.replace(f"//{anywhere}:", f"//{socket.gethostname()}:")
    write_whole(note, url + "\n", durable=False)
    return note
