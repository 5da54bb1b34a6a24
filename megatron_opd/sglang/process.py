"""SGLang servers that a run starts and ends: command line, environment, ports, logs, readiness, shutdown by pid.

A server is a process group of its own with a log file. It ends with `stop`, and on Linux also when the process that
started it dies without a word. Without a GPU the real SGLang is started too, in plain torch (`cpu_stand_ins/`).
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import yaml

from megatron_opd.config import ServersConfig
from megatron_opd.config.checks_serving import ADMIN_KEY, API_KEY
from megatron_opd.core import lifeline
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.errors import SGLangError
from megatron_opd.sglang.ports import free_port

_STAND_INS = Path(__file__).parent / "cpu_stand_ins"
_LOG_LINES = 30
_POLL_S, _SAY_EVERY_S = 0.5, 15.0
_STOP_S = 15.0
"""Seconds that a server has for ending by itself."""
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# What torchrun and srun tell a rank about its own job. A server is a job of its own, and would believe it.
_OF_THE_RANK = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "SLURM_", "PMI")


@dataclass(frozen=True, slots=True)
class Server:
    """A started server."""

    name: str
    """Of what it serves, which its log has too: all servers of a model have the same."""
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    command: tuple[str, ...] = field(repr=False)
    environment: dict[str, str] = field(repr=False)

    @property
    def pid(self) -> int:
        """Of its main process, which is also the number of its process group."""
        return self.process.pid


def without_interpreter(servers: ServersConfig) -> str:
    """Advice where the interpreter that starts the servers is not on this machine; empty where it is."""
    python = _interpreter(servers)
    if python.is_file() and os.access(python, os.X_OK):
        return ""
    what = "cannot be executed" if python.exists() else "does not exist"
    return (
        f"{python} {what}; `megatron-opd install-sglang` installs SGLang into an environment of its own, or let"
        " servers.python name the interpreter of yours"
    )


def _interpreter(servers: ServersConfig) -> Path:
    return Path(servers.python).expanduser().absolute()


def start(
    servers: ServersConfig,
    model: str | Path,
    *,
    name: str,
    log_dir: str | Path,
    context: int,
    extra: Sequence[str] = (),
    sees_all: bool = False,
) -> list[Server]:
    """Start `servers.count` servers of `model`, logging to <log_dir>/<name>-<i>.log; `wait` says when they are ready.

    `context` is the longest prompt and response together, at most what the model allows; `extra` are arguments before
    `servers.args`. `sees_all`: weights come as CUDA IPC handles, so the servers see every GPU under the number that it
    has for the trainer. Raises ValueError when there is no SGLang, or when there are too few GPUs.
    """
    if missing := without_interpreter(servers):
        raise ValueError(f"servers.python: {missing}")
    python = _interpreter(servers)
    Path(log_dir).mkdir(parents=True, exist_ok=True)
    gpus = _gpus(servers)
    started: list[Server] = []
    try:
        for i in range(servers.count):
            port = free_port(servers.host, servers.port)
            command = [str(python), "-m", "sglang.launch_server", *_arguments(servers, model, port, context)]
            own = gpus[i * servers.tensor :][: servers.tensor]
            seen, placed = _placed(servers, own, sees_all=sees_all or servers.colocated)
            environment = _environment(seen, servers.tensor)
            command += [*placed, *extra, *servers.args]
            log = Path(log_dir) / f"{name}-{i}.log"
            log.unlink(missing_ok=True)
            spawned = _spawn(command, environment, log)
            url = f"http://[{servers.host}]:{port}" if ":" in servers.host else f"http://{servers.host}:{port}"
            started.append(Server(name, url, spawned, log, tuple(command), environment))
    except BaseException:
        stop(started)
        raise
    return started


def wait(started: Sequence[Server], servers: ServersConfig, *, say: Callable[[str], None]) -> None:
    """Return when all of them answer. `say` gets lines of progress.

    Raises ValueError, with the end of the log, for one that ended or is not ready in `servers.start_timeout_s`; the
    others still run then, and are the caller's to `stop`.
    """
    began = said = time.monotonic()
    waiting = list(started)
    while waiting:
        for server in list(waiting):
            if server.process.poll() is not None:
                raise ValueError(f"{obituary(server)} before it was ready; {_tail(server.log)}")
            if asyncio.run(_answers(server.url, servers)):
                waiting.remove(server)
                said = time.monotonic()
                say(f"{server.url} is ready after {said - began:.0f} s ({len(waiting)} to go)")
        now = time.monotonic()
        if waiting and now - began > servers.start_timeout_s:
            raise ValueError(
                f"{waiting[0].url} is not ready after {servers.start_timeout_s:g} s (servers.start_timeout_s);"
                f" {_tail(waiting[0].log)}"
            )
        if waiting and now - said > _SAY_EVERY_S:
            said = now
            say(f"waiting for {', '.join(s.url for s in waiting)}: {now - began:.0f} s, log {waiting[0].log}")
        time.sleep(_POLL_S)


def restart(server: Server) -> Server:
    """Start one that has ended again, at its address; its log goes on. It is not waited for."""
    _kill_group(server)  # workers may outlive their main process, with its memory
    return replace(server, process=_spawn(server.command, server.environment, server.log))


def stop(started: Iterable[Server], grace_s: float = _STOP_S) -> None:
    """End them: politely at first, then by force, with every process of theirs. Harmless for what has ended."""
    started = list(started)
    for server in started:
        if server.process.poll() is None:
            server.process.terminate()
    deadline = time.monotonic() + grace_s
    for server in started:
        with suppress(subprocess.TimeoutExpired):
            server.process.wait(max(deadline - time.monotonic(), 0))
        _kill_group(server)
        server.process.wait()


def _kill_group(server: Server) -> None:
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


def _arguments(servers: ServersConfig, model: str | Path, port: int, context: int) -> list[str]:
    """Of sglang.launch_server. Only ids travel, so a server needs no tokenizer."""
    arguments = {
        "--model-path": str(model),
        "--host": servers.host,
        "--port": str(port),
        "--tp-size": str(servers.tensor),
        "--context-length": str(context),
        "--dtype": _dtype(servers, model),
        "--skip-tokenizer-init": None,
        "--skip-server-warmup": None,
    }
    if not torch.cuda.is_available():
        arguments |= {
            "--device": "cpu",
            "--attention-backend": "torch_native",
            "--sampling-backend": "pytorch",
            "--grammar-backend": "none",
            "--disable-overlap-schedule": None,
            "--max-running-requests": str(min(servers.max_in_flight, 64)),
            # By default the cache takes most of the machine's memory.
            "--max-total-tokens": str(max(16 * context, 1 << 14)),
            "--mem-fraction-static": "0.1",
        }
    if os.environ.get(API_KEY) or os.environ.get(ADMIN_KEY):
        arguments["--log-level"] = "warning"  # at level info SGLang logs its arguments, the keys among them
    return [word for option, value in arguments.items() for word in (option, value) if word is not None]


def _dtype(servers: ServersConfig, model: str | Path) -> str:
    """Named in full, because SGLang's `auto` makes float16 of fp32 models."""
    if servers.dtype != "auto":
        return _DTYPES[servers.dtype]
    try:
        config = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError):
        return "auto"  # SGLang will say what is wrong with the model
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def _gpus(servers: ServersConfig) -> list[str]:
    """The devices of all servers in order, as CUDA_VISIBLE_DEVICES names them; none without a GPU."""
    if not torch.cuda.is_available():
        return []
    names = _visible()
    wanted = servers.gpus or list(range(len(names)))
    needed = servers.count * servers.tensor
    if len(wanted) < needed or max(wanted, default=0) >= len(names):
        raise ValueError(
            f"servers.gpus: {servers.count} servers of {servers.tensor} GPUs need {needed}, but {wanted} of"
            f" {len(names)} visible ones are given; lower servers.count or servers.tensor"
        )
    return [names[i] for i in wanted[:needed]]


def _visible() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def _placed(servers: ServersConfig, gpus: list[str], *, sees_all: bool) -> tuple[list[str], list[str]]:
    """(devices that a server on these GPUs sees, arguments). One that sees all does so as a rank of the trainer does: a
    CUDA IPC handle names the sender's GPU by its number. It takes GPUs that follow each other."""
    saver = ["--enable-memory-saver"] if gpus and servers.colocated else []
    if not (gpus and sees_all):
        return gpus, saver
    names = _visible()
    return names, [*saver, "--base-gpu-id", str(names.index(gpus[0]))]


def _environment(gpus: list[str], tensor: int) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_THE_RANK)}
    for key in (API_KEY, ADMIN_KEY):
        environment.pop(key, None)
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if gpus:
        return environment | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    inherited = environment.get("PYTHONPATH")
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(_STAND_INS), *([inherited] if inherited else [])]),
        "SGLANG_USE_CPU_ENGINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    if tensor > 1:  # SGLang would give each rank a NUMA node of its own, and most machines have fewer
        cores = sorted(os.sched_getaffinity(0))
        binding = "|".join(str(cores[rank % len(cores)]) for rank in range(tensor))
        environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", binding)
    return environment


def _spawn(command: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """In a session of its own. Keys go in by an unnamed pipe, so that neither `ps` nor a file shows them: SGLang reads
    arguments from a file whose name ends in .yaml, and what has that name is a link to the pipe."""
    keys = {"api-key": os.environ.get(API_KEY), "admin-api-key": os.environ.get(ADMIN_KEY)}
    given = {name: key for name, key in keys.items() if key}
    read_end = None
    if given:
        read_end, write_end = os.pipe()
        with os.fdopen(write_end, "w") as pipe:
            yaml.safe_dump(given, pipe)
        link = log.with_suffix(".keys.yaml")
        link.unlink(missing_ok=True)
        link.symlink_to(f"/dev/fd/{read_end}")
        command = [*command, "--config", str(link)]
    try:
        with log.open("ab") as out:
            out.write(f"$ {shlex.join(command)}\n".encode())
            out.flush()
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: lifeline.end_with_parent(signal.SIGTERM),  # on which SGLang ends its workers
                pass_fds=() if read_end is None else (read_end,),
            )
    finally:
        if read_end is not None:
            os.close(read_end)


async def _answers(url: str, servers: ServersConfig) -> bool:
    async with Client(url, servers, vocab_size=1, context=1) as client:
        try:
            await client.health(timeout_s=_POLL_S + 5)
        except SGLangError:
            return False
    return True


def obituary(server: Server) -> str:
    """How one that has ended did."""
    code = server.process.returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"the server {server.url} {how}"


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    return "\n".join([f"the end of {log}:", *lines])
