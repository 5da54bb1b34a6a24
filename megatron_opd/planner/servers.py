"""The servers of a run: whether weights and cache fit, how many sequences run together, and how long a step keeps them.

Sampling is bound by memory: every token reads all weights and the cache of its sequence. So what counts is how many
sequences share a reading, which the room for their cache decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_opd.config import ServersConfig, TeacherConfig
from megatron_opd.models.architecture import Architecture
from megatron_opd.planner import flops, memory, sizes, traffic
from megatron_opd.planner.gpus import BYTES
from megatron_opd.planner.job import Job, gpus_of

_SHARE = "--mem-fraction-static"
_MOST_SERVERS = 4096
"""More are not looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """One model behind servers, or the embedded engine."""

    name: str
    setting: str
    """Where its servers are set; "" for the embedded engine."""
    teacher: int | None = None
    """Its place in the config's teachers; None for the student's engine."""
    gpus: int
    is_colocated: bool = False
    """Whether they are the trainer's."""
    weights: float
    """Bytes on each GPU."""
    cache_tokens: int
    """Tokens whose keys and values fit on a server; 0: the weights alone are too large."""
    concurrent: int
    """Sequences that a server computes together."""
    seconds: float
    """That a step keeps the servers busy."""


def rollout(job: Job) -> Role:
    """Where the student samples."""
    rollout, length = job.config.rollout, job.prompt + job.response
    if not rollout.is_served:
        return _embedded(job)
    servers = rollout.servers
    dtype = _dtype(servers, job.config.student.dtype)
    weights = _weights(job, dtype) / servers.tensor
    room = _room(job, weights, job.student, BYTES[dtype], servers)
    count = gpus_of(servers) // servers.tensor
    concurrent = min(math.ceil(job.sequences / count), max(int(room // length), 1), servers.max_in_flight)
    return Role(
        name="rollout",
        setting="rollout.servers",
        gpus=gpus_of(servers),
        is_colocated=servers.colocated,
        weights=weights,
        cache_tokens=room,
        concurrent=concurrent,
        seconds=_sampling(job, dtype, servers.tensor, count, concurrent) if room else math.inf,
    )


def teacher(job: Job, index: int) -> Role:
    """One served teacher, which only reads. Of a family that we do not know, time and memory are not known either."""
    asked, arch = job.config.teachers[index], job.teachers[index]
    servers, name = asked.servers, f"teacher-{asked.name}"
    setting = f"teachers.{index}.servers"
    if arch is None:
        nothing = {"weights": 0.0, "cache_tokens": 0, "concurrent": 0, "seconds": 0.0}
        return Role(name=f"{name} (unknown family)", setting=setting, teacher=index, gpus=gpus_of(servers), **nothing)  # type: ignore[arg-type]
    dtype = _dtype(servers, "bf16")
    weights = sizes.numel(sizes.whole(arch)) * BYTES[dtype] / servers.tensor
    room = _room(job, weights, arch, BYTES[dtype], servers)
    concurrent = max(int(room // (job.prompt + job.response)), 1)
    return Role(
        name=name,
        setting=setting,
        teacher=index,
        gpus=gpus_of(servers),
        weights=weights,
        cache_tokens=room,
        concurrent=min(concurrent, servers.max_in_flight, job.sequences),
        seconds=_reading(job, asked, arch, dtype) if room else math.inf,
    )


def _weights(job: Job, dtype: str) -> float:
    """Bytes of the student that samples."""
    return sizes.served_bytes(job.student, BYTES[dtype], in_fp8=job.config.rollout.quantization == "fp8")


def _embedded(job: Job) -> Role:
    """transformers on the leader of each replica."""
    replicas = job.config.parallel.data
    concurrent = memory.engine_rows(job)
    dtype = job.config.rollout.dtype
    weights = float(BYTES[dtype]) * sizes.numel(sizes.whole(job.student))
    seconds = _sampling(job, dtype, 1, replicas, concurrent)
    room = concurrent * job.longest
    return Role(
        name="rollout (embedded)", setting="", gpus=replicas, weights=weights, cache_tokens=room,
        concurrent=concurrent, seconds=seconds,
    )  # fmt: skip


def _dtype(servers: ServersConfig, auto: str) -> str:
    return auto if servers.dtype == "auto" else servers.dtype


def _room(job: Job, weights: float, arch: Architecture, size: int, servers: ServersConfig) -> int:
    """Tokens of cache beside the weights on a server; 0: not even one sequence."""
    free = job.gpu.memory * _share(servers, job.assumed.server)
    if servers.colocated:
        free = min(free, _left_by_trainer(job))
    free -= weights
    room = int(free // memory.cache_bytes(arch, size, servers.tensor)) if free > 0 else 0
    return room if room >= job.longest else 0


def crowded(job: Job) -> str | None:
    """What is wrong where servers on the trainer's GPUs are told to take more than it leaves them."""
    servers, left = job.config.rollout.servers, _left_by_trainer(job)
    share = _share(servers, 0.0)
    if not servers.colocated or share * job.gpu.memory <= left:
        return None
    most, keeps = math.floor(max(left, 0) / job.gpu.memory * 100) / 100, memory.resting(job)
    return (
        f"rollout: {_SHARE} {share:g} is {share * job.gpu.memory / 1e9:.1f} GB of a {job.gpu_name}, but the trainer"
        f" keeps {keeps / 1e9:.1f} GB and leaves {max(left, 0) / 1e9:.1f} GB; lower it in rollout.servers.args to"
        f" {most:.2f}"
    )


def _left_by_trainer(job: Job) -> float:
    """Bytes of a GPU beside what the trainer never gives back."""
    return job.gpu.memory * job.assumed.usable - memory.resting(job)


def _share(servers: ServersConfig, assumed: float) -> float:
    """Of a GPU's memory that a server is told to take for weights and cache, or what is assumed when it is not told."""
    for i, word in enumerate(servers.args):
        name, equals, value = word.partition("=")
        if name == _SHARE:
            return _number(value if equals else "".join(servers.args[i + 1 : i + 2]))
    return assumed


def _number(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise ValueError(f"servers.args: {_SHARE} must be followed by a number between 0 and 1, not '{text}'")
    return share


def _sampling(job: Job, dtype: str, tensor: int, servers: int, concurrent: int) -> float:
    """Reading the prompts, then waves of sequences that are sampled together, a token a step."""
    gpu, assumed, arch = job.gpu, job.assumed, job.student
    size, rate = BYTES[dtype], gpu.flops(dtype) * assumed.scoring * tensor
    read = _weights(job, dtype) / tensor
    read += concurrent * memory.cache_bytes(arch, size, tensor) * (job.prompt + job.response / 2)
    flops_a_token = flops.decoding(job) / (job.sequences * job.response)
    step = max(read / (gpu.bandwidth * assumed.decoding), concurrent * flops_a_token / rate)
    waves = job.sequences / (servers * concurrent)
    return flops.prefill(job) / (rate * servers) + max(waves, 1.0) * job.response * step


def _reading(job: Job, asked: TeacherConfig, arch: Architecture, dtype: str) -> float:
    """Forward passes over whole sequences, or the way of their answers where that takes longer."""
    gpu, assumed, servers = job.gpu, job.assumed, asked.servers
    compute = flops.scoring(job, asked, arch) / (gpu.flops(dtype) * assumed.scoring * gpus_of(servers))
    count = gpus_of(servers) // servers.tensor
    return max(compute, traffic.of_teachers(job)[asked.name] / (gpu.network * assumed.transfer * count))


def roles(job: Job) -> list[Role]:
    """The engine first, then every served teacher."""
    served = [i for i, t in enumerate(job.config.teachers) if t.is_served]
    return [rollout(job), *(teacher(job, i) for i in served)]


def keeping_pace(job: Job, role: Role, seconds: float) -> int | None:
    """The fewest GPUs, in servers of the same size, with which a step keeps a role busy for no more than `seconds`.

    None where no number of servers is enough, because one sequence alone takes longer.
    """
    index = role.teacher
    servers = job.config.rollout.servers if index is None else job.config.teachers[index].servers

    def is_enough(count: int) -> bool:
        other = _with_servers(job, index, count)
        return (rollout(other) if index is None else teacher(other, index)).seconds <= seconds

    most = 1
    while not is_enough(most):
        if most > _MOST_SERVERS:
            return None
        most *= 2
    return servers.tensor * _first(is_enough, most // 2 + 1, most)


def _first(is_enough: Callable[[int], bool], low: int, high: int) -> int:
    """The least number in [low, high] that is enough; `high` is."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low


def _with_servers(job: Job, index: int | None, count: int) -> Job:
    config = job.config
    if index is None:
        servers = replace(config.rollout.servers, count=count, urls=[])
        return replace(job, config=replace(config, rollout=replace(config.rollout, servers=servers)))
    teachers = list(config.teachers)
    teachers[index] = replace(teachers[index], servers=replace(teachers[index].servers, count=count, urls=[]))
    return replace(job, config=replace(config, teachers=teachers))
