"""Problems of servers, carriers and the losses that they allow; each names the setting to change."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
from collections.abc import Iterator
from urllib.parse import urlsplit

from megatron_opd.config import LossConfig, ParallelConfig, RolloutConfig, ServersConfig, TeacherConfig
from megatron_opd.config.rollout_engines import ENGINES, engines_that_take

API_KEY = "MEGATRON_OPD_API_KEY"
"""Environment variable of the servers' key."""
ADMIN_KEY = "MEGATRON_OPD_ADMIN_KEY"
"""The same for control requests."""
_SETTINGS_OF = {
    "--host": "host",
    "--port": "port",
    "--tp": "tensor",
    "--tp-size": "tensor",
    "--tensor-parallel-size": "tensor",
    "--dtype": "dtype",
}
"""Arguments of servers that have a setting here: with another port, say, we would wait on the wrong one."""


def check_serving(
    rollout: RolloutConfig, teachers: list[TeacherConfig], loss: LossConfig, parallel: ParallelConfig
) -> list[str]:
    """Every such problem."""
    problems = [
        *_check_engine(rollout),
        *_check_loss(loss, teachers),
        *_check_colocated(rollout, teachers, ranks=parallel.world_size),
    ]
    for i, teacher in enumerate(teachers):
        problems += _check_teacher(f"teachers.{i}", teacher)
    for what, servers in _served(rollout, teachers):
        problems += _check_servers(what, servers)
    served = [what for what, _ in _served(rollout, teachers)]
    if served and importlib.util.find_spec("aiohttp") is None:
        problems.append(f"{', '.join(served)}: servers need the package aiohttp, which is not installed")
    return problems


def check_vocabulary(rollout: RolloutConfig, teachers: list[TeacherConfig], size: int) -> list[str]:
    """Settings that ask a server for more tokens than the vocabulary has, which would end it."""
    asked = {"rollout.top_k": rollout.top_k}
    asked |= {f"teachers.{i}.top_k": t.top_k for i, t in enumerate(teachers) if t.carrier == "topk"}
    return [
        f"{name} ({k}) must not be above {size}, the entries of the models' vocabulary"
        for name, k in asked.items()
        if k > size
    ]


def _served(rollout: RolloutConfig, teachers: list[TeacherConfig]) -> Iterator[tuple[str, ServersConfig]]:
    """The settings of servers that are used."""
    if rollout.is_served:
        yield "rollout.servers", rollout.servers
    for i, teacher in enumerate(teachers):
        if teacher.is_served:
            yield f"teachers.{i}.servers", teacher.servers


def _check_engine(rollout: RolloutConfig) -> list[str]:
    problems = []
    if rollout.partial and rollout.max_staleness < 1:
        problems.append("rollout.partial needs rollout.max_staleness of 1 or more: kept answers are stale")
    not_for_all = {
        "dtype": rollout.dtype != "fp32",
        "top_p": rollout.top_p != 1,
        "top_k": rollout.top_k != 0,
        "max_staleness": rollout.max_staleness != 0,
        "partial": rollout.partial,
        "quantization": rollout.quantization != "none",
        "sync_verify": rollout.sync_verify,
        "servers": rollout.servers != ServersConfig(),
    }
    problems += [
        f"rollout.{name} needs rollout.engine: {engines_that_take(name)}, not {rollout.engine}"
        for name, is_set in not_for_all.items()
        if is_set and name not in ENGINES[rollout.engine].takes
    ]
    return problems


def _check_teacher(what: str, teacher: TeacherConfig) -> list[str]:
    problems = []
    if not teacher.is_served:
        if teacher.carrier != "hidden":
            problems.append(
                f"{what}.carrier: {teacher.carrier} needs {what}.backend: sglang; a teacher on the trainer's ranks is"
                " exact, so it has carrier hidden"
            )
        if teacher.on_failure != "fail":
            problems.append(f"{what}.on_failure: {teacher.on_failure} needs {what}.backend: sglang")
        if teacher.servers != ServersConfig():
            problems.append(f"{what}.servers needs {what}.backend: sglang, not {teacher.backend}")
    return problems


def _check_colocated(rollout: RolloutConfig, teachers: list[TeacherConfig], *, ranks: int) -> list[str]:
    """Settings that do not go with servers on the trainer's own GPUs."""
    what = "rollout.servers.colocated"
    problems = [
        f"teachers.{i}.servers.colocated: only the student's servers can be; a teacher on the trainer's GPUs is"
        f" teachers.{i}.backend: megatron, with teachers.{i}.offload where memory is short"
        for i, teacher in enumerate(teachers)
        if teacher.servers.colocated
    ]
    servers = rollout.servers
    if not servers.colocated:
        return problems
    if rollout.max_staleness:
        problems.append(
            f"rollout.max_staleness ({rollout.max_staleness}) needs servers with GPUs of their own: those of {what}"
            " have no memory while the student trains"
        )
    wanted = servers.tensor * servers.count
    if servers.urls:
        return problems
    if not any(arg.startswith("--mem-fraction-static") for arg in servers.args):
        problems.append(
            f"{what} needs --mem-fraction-static in rollout.servers.args, the part of a GPU that servers may have while"
            " the trainer keeps its weights, gradients and optimizer there; otherwise they take nearly all of it"
        )
    if wanted > ranks:
        problems.append(
            f"{what}: rollout.servers.count x rollout.servers.tensor servers take {wanted} GPUs, but the trainer has"
            f" {ranks} (parallel.tensor x parallel.pipeline x parallel.context x parallel.data)"
        )
    elif servers.gpus and servers.gpus != list(range(servers.gpus[0], servers.gpus[0] + wanted)):
        problems.append(f"rollout.servers.gpus must be {wanted} numbers in a row with {what}, not {servers.gpus}")
    elif servers.gpus and servers.gpus[-1] >= ranks:
        problems.append(
            f"rollout.servers.gpus: {servers.gpus} are not the trainer's, which takes the first {ranks} and which"
            f" {what} shares"
        )
    return problems


def _check_loss(loss: LossConfig, teachers: list[TeacherConfig]) -> list[str]:
    """Losses and ensembles that the carriers of the teachers do not allow."""
    problems = []
    if loss.kind == "sampled" and loss.beta != 1:
        problems.append(f"loss.kind: sampled is reverse KL, so loss.beta must be 1, not {loss.beta}")
    for i, teacher in enumerate(teachers):
        what = f"teachers.{i}.carrier: {teacher.carrier}"
        if teacher.carrier == "sampled" and loss.kind != "sampled":
            problems.append(f"{what} needs loss.kind: sampled; a divergence needs hidden or topk")
        if teacher.carrier != "hidden" and loss.temperature != 1:
            problems.append(
                f"{what} needs loss.temperature: 1, not {loss.temperature}, because it does not say how"
                " tempered probabilities sum; it is allowed for hidden"
            )
        if teacher.carrier != "hidden" and loss.ensemble == "logits" and len(teachers) > 1:
            problems.append(
                f"{what} with several teachers needs loss.ensemble: probs; an average of logits needs"
                " every teacher's whole distribution (carrier hidden)"
            )
    return problems


def _check_servers(what: str, servers: ServersConfig) -> list[str]:
    problems = [f"{what}.urls: {why}" for url in servers.urls if (why := _wrong_url(url))]
    if len({url.rstrip("/") for url in servers.urls}) < len(servers.urls):
        problems.append(f"{what}.urls names a server twice")
    return problems if servers.urls else problems + _check_started(what, servers)


def _check_started(what: str, servers: ServersConfig) -> list[str]:
    """Problems of servers that `train` starts."""
    given = {word.partition("=")[0] for word in servers.args}
    problems = [
        f"{what}.args: {option} would show its key to everybody on the machine, in logs and in the recorded settings;"
        f" put it into the environment variable {key}"
        for option, key in (("--api-key", API_KEY), ("--admin-api-key", ADMIN_KEY))
        if option in given
    ]
    problems += [
        f"{what}.args: {option} is set by {what}.{setting}"
        for option, setting in _SETTINGS_OF.items()
        if option in given
    ]
    wanted = servers.tensor * servers.count
    if servers.gpus and len(set(servers.gpus)) < len(servers.gpus):
        problems.append(f"{what}.gpus must be different numbers, not {servers.gpus}")
    elif servers.gpus and len(servers.gpus) != wanted:
        problems.append(
            f"{what}.gpus names {len(servers.gpus)}, but {what}.count x {what}.tensor servers take {wanted}"
        )
    if not servers.python:
        problems.append(f"{what}.python must not be empty")
    if not is_loopback(servers.host) and not os.environ.get(API_KEY):
        problems.append(
            f"{what}.host: {servers.host} can be reached from elsewhere, so servers there need a key: set the"
            f" environment variable {API_KEY}, or choose 127.0.0.1"
        )
    return problems


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _wrong_url(url: str) -> str | None:
    """The problem with a server's address, without the address where it may hold a password."""
    if "@" in url:
        return f"an address must not hold a user or password; put the key into the environment variable {API_KEY}"
    try:
        parts = urlsplit(url)
        _ = parts.port  # which raises where it is not a number up to 65535
    except ValueError as error:
        return f"{url} is not an address: {error}"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"{url} must begin with http:// or https:// and a host"
    if parts.query or parts.fragment:
        return f"{url} must have nothing after ? or #"
    return None
