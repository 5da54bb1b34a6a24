"""Host memory: of a rank by part, and of the machine that the ranks of a node share.

On GPUs it is the programs themselves, prompts, teachers that wait in host memory, and what a save or the start takes
for a moment. Without GPUs the models, and everything else that `memory.py` counts, are there too.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_opd.config import TeacherConfig
from megatron_opd.models.architecture import Architecture
from megatron_opd.planner import memory, sizes
from megatron_opd.planner.gpus import BYTES
from megatron_opd.planner.job import Job, gpus_of
from megatron_opd.planner.memory import RankMemory

EXPORT_BUCKET = 64 << 20
"""Bytes of weights that an export gathers at a time."""
_PROMPTS = 2
"""Bytes for a byte of a file of prompts: the row, and its token ids. With an environment its messages come besides."""
_OF_THE_ENGINE = ("engine weights", "engine cache", "engine's passes")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """Bytes of a machine."""

    on_gpu: bool
    ranks: list[RankMemory]
    """The first tensor-parallel rank of every pipeline stage of a replica."""
    ranks_here: int
    """Ranks on the machine."""
    trainer: float
    """All ranks on the machine, each at its peak."""
    others: dict[str, float]
    """Launcher, servers, and sessions of the tool python, by name."""

    @property
    def rank(self) -> RankMemory:
        """The rank that needs most."""
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def total(self) -> float:
        return self.trainer + sum(self.others.values())


def machine(job: Job, *, on_gpu: bool) -> HostMemory:
    """The host memory of one machine. Ranks with GPUs are spread over as many as they need; without, all are on one."""
    job = dataclasses.replace(job, on_gpu=on_gpu)
    ranks = [_rank(job, stage) for stage in range(job.config.parallel.pipeline)]
    layout = job.config.parallel
    peers = layout.tensor * layout.context - 1
    every = layout.data * sum(rank.total + peers * _without_engine(rank).total for rank in ranks)
    machines = math.ceil(layout.world_size / job.assumed.gpus_per_node) if on_gpu else 1
    others = {"launcher": job.assumed.process, "servers": _servers(job), "sessions": _sessions(job) / machines}
    return HostMemory(
        on_gpu=on_gpu,
        ranks=ranks,
        ranks_here=math.ceil(layout.world_size / machines),
        trainer=every / machines,
        others={name: size for name, size in others.items() if size},
    )


def _rank(job: Job, stage: int) -> RankMemory:
    own = {"programs": job.assumed.process + job.assumed.cuda * job.on_gpu, "prompts": _prompts(job)}
    moments = {"a save": _save(job, stage)}
    if not job.on_gpu:
        found = memory.trainer(job)[stage]
        return RankMemory(stage=stage, always=own | found.always, moments=found.moments | moments)
    waiting = sum(_weights(job, teacher, arch, stage) for teacher, arch in job.inside if teacher.offload)
    starts = 0.0 if job.config.rollout.is_served or stage else 4.0 * sizes.numel(sizes.whole(job.student))
    return RankMemory(
        stage=stage,
        always={**own, "teachers that wait": waiting},
        moments={**moments, "the start": {"engine weights": starts}},
    )


def _without_engine(rank: RankMemory) -> RankMemory:
    """The same for a rank that is no leader."""

    def without(parts: dict[str, float]) -> dict[str, float]:
        return {name: size for name, size in parts.items() if name not in _OF_THE_ENGINE}

    moments = {name: without(parts) for name, parts in rank.moments.items()}
    return RankMemory(stage=rank.stage, always=without(rank.always), moments=moments)


def _weights(job: Job, teacher: TeacherConfig, arch: Architecture, stage: int) -> float:
    """Bytes of a teacher's weights on a rank of a stage, without its head."""
    parameters = [p for p in sizes.stage_parameters(arch, job.config.parallel, stage) if p.name != "head"]
    return float(sizes.numel(parameters) * BYTES[teacher.dtype])


def _save(job: Job, stage: int) -> dict[str, float]:
    """Memory that a save takes for a moment: two tensors from a GPU, and whole parameters of which a rank has only a
    part. The export at the end takes a bucket of weights twice over, gathered and put together."""
    layout = job.config.parallel
    largest = max(p.numel for p in sizes.stage_parameters(job.student, layout, stage))
    states = 12 if BYTES[job.config.student.dtype] == 2 else 8
    is_cut = job.config.optim.distributed and layout.data * layout.context > 1
    return {
        "parameters put together": 2.0 * states * largest if is_cut else 0.0,
        "tensors on their way": 2.0 * 4 * largest if job.on_gpu else 4.0 * largest + EXPORT_BUCKET,
    }


def _prompts(job: Job) -> float:
    """Bytes of the prompts, which every rank has, by the sizes of their files; of others nothing is known."""
    data, found = job.config.data, 0
    for source in (*data.train, *data.eval):
        if source.path and (file := Path(source.path)).is_file():
            keeps_messages = job.config.environment_of(source).is_on
            found += (_PROMPTS + keeps_messages) * _unpacked(file)
    return float(found)


def _unpacked(file: Path) -> int:
    """Bytes of a file as it is read. The last four bytes of a gzip file are its unpacked size, modulo 4 GiB. Parquet
    packs too, but only a reader of it knows by how much."""
    size = file.stat().st_size
    if file.suffix != ".gz" or size < 4:
        return size
    with file.open("rb") as opened:
        opened.seek(-4, os.SEEK_END)
        return max(size, int.from_bytes(opened.read(4), "little"))


def _sessions(job: Job) -> float:
    """Bytes of all sessions of the tool python, one for each episode of a step."""
    has_python = any("python" in environment.tools for environment in job.config.environments)
    return job.assumed.session * job.sequences * has_python


def _servers(job: Job) -> float:
    """Bytes of the processes of servers that the run starts, at most one a GPU of a machine."""
    config = job.config
    models = [config.rollout, *config.teachers]
    started = [model.servers for model in models if model.is_served and not model.servers.urls]
    return job.assumed.server_process * min(sum(map(gpus_of, started)), job.assumed.gpus_per_node)
