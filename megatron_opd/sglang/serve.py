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

import torch

from megatron_opd.config import Config, ServersConfig
from megatron_opd.core import run_dir
from megatron_opd.models.architecture import read_limits
from megatron_opd.sglang import process
from megatron_opd.sglang.weights.group import LOOPBACK, own_address

ANYWHERE = "0.0.0.0"
"""The address of servers that other machines are to reach."""
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
    """Longest prompt and answer together that the config allows."""
    arguments: tuple[str, ...]
    """Of sglang.launch_server, as this use of the model needs."""

    @property
    def context(self) -> int:
        """Longest prompt and answer together that the run will ask about; reads the model's config.json."""
        return min(self.longest, read_limits(self.model)[1])


def needed(config: Config) -> list[Served]:
    """Every model of the config that is behind servers, started by us or not."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens + MARGIN
    found = []
    if config.rollout.engine == "sglang":
        # A Megatron checkpoint has no weights that SGLang could read; the first sync brings them.
        has_weights = any(Path(config.student.model).glob("*.safetensors"))
        found.append(
            Served(
                name="rollout",
                setting="rollout.servers",
                servers=_like_the_student(config),
                model=config.student.model,
                longest=longest,
                arguments=() if has_weights else ("--load-format", "dummy"),
            )
        )
    for i, teacher in enumerate(config.teachers):
        if teacher.backend == "sglang":
            hidden = ("--enable-return-hidden-states",) if teacher.carrier == "hidden" else ()
            found.append(
                Served(
                    name=f"teacher-{teacher.name}",
                    setting=f"teachers.{i}.servers",
                    servers=teacher.servers,
                    model=teacher.model,
                    longest=longest,
                    arguments=hidden,
                )
            )
    return found


def _like_the_student(config: Config) -> ServersConfig:
    """Samplers compute in the trainer's type: what differs between the two is noise in every loss."""
    servers = config.rollout.servers
    return dataclasses.replace(servers, dtype=config.student.dtype) if servers.dtype == "auto" else servers


def to_start(config: Config, only: Sequence[str] = ()) -> list[Served]:
    """Those without urls; with `only`, the named ones among them. Raises ValueError for an unknown name."""
    ours = [served for served in needed(config) if not served.servers.urls]
    if unknown := sorted(set(only) - {served.name for served in ours}):
        names = ", ".join(served.name for served in ours) or "none"
        raise ValueError(f"--only: this config starts no servers named {', '.join(unknown)}; it starts: {names}")
    return [served for served in ours if not only or served.name in only]


@contextmanager
def running(
    config: Config, *, say: Callable[[str], None], only: Sequence[str] = (), beside_ranks: bool = False
) -> Iterator[list[process.Server]]:
    """Start the servers that the config leaves to us, wait for them, and note them; end them with the block.

    `beside_ranks`: the trainer's ranks run on this machine too. Raises ValueError for servers that do not get ready.
    """
    ours = to_start(config, only)
    _check_gpus(ours, is_shared=beside_ranks or len(ours) > 1)
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
    rollout, teachers = config.rollout, list(config.teachers)
    for served in needed(config):
        if served.servers.urls:
            continue
        notes = sorted((Path(config.run.dir) / run_dir.SERVERS).glob(f"{served.name}@*"))
        if not notes:
            raise ValueError(
                f"{served.setting}: no servers for {served.name} are running; start them with `megatron-opd serve` and"
                f" the same config, or name yours in {served.setting}.urls"
            )
        servers = dataclasses.replace(served.servers, urls=[note.read_text().strip() for note in notes])
        if served.name == "rollout":
            rollout = dataclasses.replace(rollout, servers=servers)
        else:
            i = int(served.setting.split(".")[1])
            teachers[i] = dataclasses.replace(teachers[i], servers=servers)
    return dataclasses.replace(config, rollout=rollout, teachers=teachers)


def reaches_out(config: Config) -> bool:
    """Whether the ranks send weights to servers on other machines, in a process group with them."""
    if config.rollout.engine != "sglang" or config.rollout.sync != "broadcast":
        return False
    try:
        return own_address(with_urls(config).rollout.servers.urls) != LOOPBACK
    except ValueError:  # no servers run; whoever asks them says so
        return False
    except OSError:  # the name of a host is not known; whoever asks it says so
        return True


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
    temporary = note.with_name(f".{note.name}")
    temporary.write_text(url + "\n")
    temporary.replace(note)
    return note
