"""Layouts that fit: the one that changes least, and the one that is fastest on the same GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_opd.config import ParallelConfig
from megatron_opd.config.models import Recompute
from megatron_opd.planner import memory, timing
from megatron_opd.planner.job import Job

_RECOMPUTE: tuple[Recompute, ...] = ("none", "full")
"""`selective` computes attention again, of which hardly anything is kept."""
_AS_FAST = 1.03
"""Layouts this close to the shortest step are as good, and the one that changes least is taken."""
_GROWTH = (1, 2, 4, 8, 16)
"""Times the GPUs of the config; more are looked at only where fewer do not do."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout that fits."""

    job: Job
    changes: int
    """How far it is from the config's: doublings and halvings of sizes, and steps of recompute."""
    seconds: float
    memory: float
    """Bytes of the rank that needs most."""

    @property
    def overrides(self) -> list[str]:
        """What to give to the command line."""
        config = self.job.config
        layout = config.parallel
        return [
            f"parallel.tensor={layout.tensor}",
            f"parallel.pipeline={layout.pipeline}",
            *([f"parallel.context={layout.context}"] if layout.context > 1 else []),
            f"parallel.data={layout.data}",
            f"parallel.sequence={str(layout.sequence).lower()}",
            *([f"parallel.expert={layout.expert}"] if self.job.student.num_experts else []),
            f"student.recompute={config.student.recompute}",
            f"train.micro_batch_size={config.train.micro_batch_size}",
        ]


def nearest(job: Job) -> Candidate | None:
    """The fitting layout with the fewest changes, on as few GPUs as possible; among equals the fastest."""
    for growth in _GROWTH:
        found = list(fitting(job, growth * job.config.parallel.world_size))
        if found:
            return min(found, key=lambda layout: (layout.changes, layout.seconds))
    return None


def fastest(job: Job) -> Candidate | None:
    """The fitting layout with the shortest step on the config's number of GPUs."""
    found = list(fitting(job, job.config.parallel.world_size))
    best = min((layout.seconds for layout in found), default=0.0)
    near = [layout for layout in found if layout.seconds <= _AS_FAST * best]
    return min(near, key=lambda layout: (layout.changes, layout.seconds), default=None)


def fitting(job: Job, world: int) -> Iterator[Candidate]:
    """Every layout of `world` GPUs that models, prompts and memory allow. Tensor parallelism stays within a node,
    context parallelism as the config has it."""
    for tensor in _powers(job.assumed.gpus_per_node):
        for pipeline in _divisors(job.student.num_layers):
            replica = tensor * pipeline * job.config.parallel.context
            if world % replica:
                continue
            parallel = _parallel(job, tensor, pipeline, world // replica)
            for recompute in _RECOMPUTE:
                yield from _with_micro_batches(job, parallel, recompute)


def _parallel(job: Job, tensor: int, pipeline: int, data: int) -> ParallelConfig:
    mixture = job.student.num_experts or any(arch.num_experts for _, arch in job.inside)
    old = job.config.parallel
    sequence = tensor > 1 and (old.sequence or old.tensor == 1 or bool(mixture))
    expert = math.gcd(tensor, job.student.num_experts) if mixture else 1
    return replace(old, tensor=tensor, pipeline=pipeline, data=data, expert=expert, sequence=sequence)


def _with_micro_batches(job: Job, parallel: ParallelConfig, recompute: Recompute) -> Iterator[Candidate]:
    if job.config.rollout.prompts_per_step % parallel.data:
        return
    per_replica = job.sequences // parallel.data
    for size in _divisors(per_replica):
        if size > job.config.train.micro_batch_size:
            continue
        tried = job.with_layout(parallel, recompute=recompute, micro_batch_size=size)
        if not tried.problems() and memory.fits(tried):
            seconds = timing.estimate(tried).seconds
            yield Candidate(tried, _changes(job, tried), seconds, memory.worst(tried).total)


def _changes(old: Job, new: Job) -> int:
    def doublings(a: int, b: int) -> int:
        return round(abs(math.log2(a / b)) + 0.49)

    a, b = old.config, new.config
    sizes = ("tensor", "pipeline")  # what is left of the GPUs is for data
    changed = sum(doublings(getattr(a.parallel, name), getattr(b.parallel, name)) for name in sizes)
    changed += doublings(a.train.micro_batch_size, b.train.micro_batch_size)
    return changed + ((a.student.recompute == "full") != (b.student.recompute == "full"))


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]
