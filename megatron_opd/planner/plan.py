"""What a run will need and how long it will take, from its config and its models' config.json alone.

Arithmetic only. `plan` answers; `table.py` and `as_dict` show it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_opd.planner import host, memory, search, servers, timing, traffic
from megatron_opd.planner.host import HostMemory
from megatron_opd.planner.job import Job
from megatron_opd.planner.memory import RankMemory
from megatron_opd.planner.search import Candidate
from megatron_opd.planner.servers import Role
from megatron_opd.planner.timing import Estimate
from megatron_opd.planner.traffic import Traffic


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The answers."""

    job: Job
    ranks: list[RankMemory]
    """Of each pipeline stage."""
    hosts: list[HostMemory]
    """Host memory of a machine, with GPUs and without."""
    roles: list[Role]
    traffic: list[Traffic]
    estimate: Estimate
    problems: list[str]
    """What does not fit, and what the layout does not divide."""
    needs_layout: bool
    """Whether it is the trainer that needs another one, not the servers alone."""
    nearest: Candidate | None
    """Where the trainer does not fit: the layout that changes least."""
    fastest: Candidate | None
    """The layout with the shortest step on as many GPUs."""

    @property
    def usable(self) -> float:
        """Bytes of a GPU that may be planned with."""
        return self.job.gpu.memory * self.job.assumed.usable


def plan(job: Job) -> Plan:
    """Everything about a job. One whose layout is impossible is planned as far as the numbers divide."""
    ranks, roles = memory.trainer(job), servers.roles(job)
    problems = job.problems()
    needs_layout = bool(problems)
    if not memory.fits(job):
        needs_layout = True
        need = memory.worst(job)
        problems.append(
            f"stage {need.stage} of the trainer needs {need.total / 1e9:.1f} GB at its peak ({need.peak_at}); a"
            f" {job.gpu_name} has {job.gpu.memory * job.assumed.usable / 1e9:.1f} GB that can be used"
        )
    problems += [problem] if (problem := servers.crowded(job)) else []
    for role in roles:
        beside = " beside what the trainer keeps" if role.is_colocated else ""
        if role.setting and not role.cache_tokens and role.concurrent:
            problems.append(
                f"{role.name}: weights of {role.weights / 1e9:.1f} GB leave a {job.gpu_name} no room for one sequence"
                f" of {job.longest} tokens{beside}; raise {role.setting}.tensor"
            )
    return Plan(
        job=job,
        ranks=ranks,
        hosts=[host.machine(job, on_gpu=on_gpu) for on_gpu in (True, False)],
        roles=roles,
        traffic=traffic.table(job),
        estimate=timing.estimate(job),
        problems=problems,
        needs_layout=needs_layout,
        nearest=search.nearest(job) if needs_layout else None,
        fastest=search.fastest(job),
    )


def as_dict(made: Plan) -> dict[str, Any]:
    """For --json: bytes, FLOPs and seconds."""
    job = made.job
    return {
        "gpu": {"name": job.gpu_name, **dataclasses.asdict(job.gpu)},
        "assumed": dataclasses.asdict(job.assumed),
        "lengths": {"prompt": job.prompt, "response": job.response, "longest": job.longest},
        "ranks": [_rank(rank) for rank in made.ranks],
        "hosts": [_host(machine) for machine in made.hosts],
        "servers": [dataclasses.asdict(role) for role in made.roles],
        "wire": {
            "bytes_a_token": {
                t.name: {"sent": traffic.carrier_bytes(t, arch), "payload": traffic.payload_bytes(t, arch)}
                for t, arch in zip(job.config.teachers, job.teachers, strict=True)
            },
            "a_step": [dataclasses.asdict(traffic) for traffic in made.traffic],
        },
        "step": dataclasses.asdict(made.estimate),
        "problems": made.problems,
        "nearest": _layout(made.nearest),
        "fastest": _layout(made.fastest),
    }


def _layout(layout: Candidate | None) -> dict[str, Any] | None:
    if layout is None:
        return None
    found = {"overrides": layout.overrides, "seconds": layout.seconds, "memory": layout.memory}
    return found | {"gpus": layout.job.config.parallel.world_size}


def _rank(rank: RankMemory) -> dict[str, Any]:
    return {"stage": rank.stage, "peak_at": rank.peak_at, "parts": rank.parts, "total": rank.total}


def _host(machine: HostMemory) -> dict[str, Any]:
    found = {"on_gpu": machine.on_gpu, "ranks": machine.ranks_here, "rank": _rank(machine.rank)}
    return found | {"trainer": machine.trainer, "others": machine.others, "total": machine.total}
