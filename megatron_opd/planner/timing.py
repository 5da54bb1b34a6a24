"""How long a step takes, stage by stage, and which stage bounds it.

    on-policy:  max(sampling, served teachers) + teachers on the ranks + training + sync
    ahead:      max(max(sampling, served teachers), teachers on the ranks + training) + sync

Served teachers read an answer as soon as it is there, so they run beside the sampling of the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_opd.planner import flops, memory, servers, sizes, traffic
from megatron_opd.planner.gpus import BYTES
from megatron_opd.planner.job import Job
from megatron_opd.sglang.weights.transports import WAYS


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a step."""

    name: str
    seconds: float
    flops: float
    gpus: int
    keeping_pace: int | None
    """GPUs with which servers take no longer than the trainer's part of a step; None where no number of servers does,
    and for what is on the trainer's ranks or GPUs."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one step."""

    stages: tuple[Stage, ...]
    seconds: float
    bound: str
    """The stage that a step waits for most."""
    tokens_per_s: float
    """Response tokens, of all replicas."""


def estimate(job: Job) -> Estimate:
    """The stages of a job, and which one a step waits for."""
    own = [_teachers_inside(job), _training(job)]
    own_s = sum(stage.seconds for stage in own)
    roles = servers.roles(job)
    served = [_served(job, role, own_s) for role in roles]
    sync = Stage("sync", _sync_seconds(job), 0.0, 0, None)
    answers = max(served, key=lambda stage: stage.seconds)
    if job.config.rollout.max_staleness:
        seconds = max(answers.seconds, own_s) + sync.seconds
        trainer = max(own, key=lambda stage: stage.seconds)
        bound = answers if answers.seconds > own_s else trainer
    else:
        seconds = answers.seconds + own_s + sync.seconds
        bound = max(answers, *own, sync, key=lambda stage: stage.seconds)
    stages = tuple(s for s in (*served, *own, sync) if s.seconds)
    return Estimate(stages, seconds, bound.name, job.sequences * job.response / seconds)


def bubble(job: Job) -> float:
    """Factor by which filling and draining the pipeline lengthens a pass."""
    return (job.micro_batches + job.config.parallel.pipeline - 1) / job.micro_batches


def _training(job: Job) -> Stage:
    """Forward, backward, communication that nothing hides, and Adam, which reads and writes its state once."""
    config, gpu, assumed = job.config, job.gpu, job.assumed
    world, work = config.parallel.world_size, flops.training(job)
    compute = work / (world * gpu.flops(config.student.dtype) * assumed.training) * bubble(job)
    layout = config.parallel
    near = layout.tensor * layout.context * layout.data <= assumed.gpus_per_node
    ring = gpu.link if layout.tensor * layout.context <= assumed.gpus_per_node else gpu.network
    reduce = traffic.gradients(job) / ((gpu.link if near else gpu.network) * assumed.transfer)
    reduce += traffic.tensor_parallel(job) / (gpu.link * assumed.transfer)
    reduce += traffic.context_parallel(job) / (ring * assumed.transfer)
    adam = 2 * memory.worst(job).always["optimizer"] / (gpu.bandwidth * assumed.decoding)
    return Stage("training", compute + reduce + adam, work, world, None)


def _teachers_inside(job: Job) -> Stage:
    """One after the other, on all ranks; those that are offloaded come from host memory first, or while those before
    them score, from the turn of the last one that was offloaded on."""
    config, gpu, assumed = job.config, job.gpu, job.assumed
    world, seconds, work, meanwhile = config.parallel.world_size, 0.0, 0.0, 0.0
    for teacher, arch in job.inside:
        made = flops.scoring(job, teacher, arch)
        work += made
        scoring = made / (world * gpu.flops(teacher.dtype) * assumed.scoring) * bubble(job)
        if teacher.offload and made:
            shards = config.parallel.tensor * config.parallel.pipeline
            copy = sizes.numel(sizes.whole(arch)) * BYTES[teacher.dtype] / shards / (gpu.host * assumed.transfer)
            seconds += max(copy - meanwhile, 0.0) if teacher.prefetch else copy
            meanwhile = 0.0
        seconds += scoring
        meanwhile += scoring
    return Stage("teachers on the ranks", seconds, work, world, None)


def _served(job: Job, role: servers.Role, own_s: float) -> Stage:
    """A role as a stage."""
    scales = role.setting and not role.is_colocated and math.isfinite(role.seconds) and role.seconds
    pace = servers.keeping_pace(job, role, own_s) if scales else None
    name = "sampling" if role.teacher is None else role.name
    return Stage(name, role.seconds, _work(job, role), role.gpus, pace)


def _work(job: Job, role: servers.Role) -> float:
    if role.teacher is None:
        return flops.prefill(job) + flops.decoding(job)
    arch = job.teachers[role.teacher]
    return flops.scoring(job, job.config.teachers[role.teacher], arch) if arch is not None else 0.0


def _sync_seconds(job: Job) -> float:
    """One broadcast to all servers; the embedded engine is on a rank that gathers what it lacks."""
    gpu, rollout = job.gpu, job.config.rollout
    layout = job.config.parallel
    if not rollout.is_served:
        missing = 1 - 1 / (layout.tensor * layout.pipeline)
        return traffic.weight_sync(job) * missing / (gpu.link * job.assumed.transfer)
    rate = gpu.link if WAYS[rollout.sync].is_local else gpu.network
    return traffic.weight_sync(job) / (rate * job.assumed.transfer)
