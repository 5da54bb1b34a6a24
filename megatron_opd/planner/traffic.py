"""What travels between ranks, servers and nodes, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opd.config import TeacherConfig
from megatron_opd.models.architecture import Architecture
from megatron_opd.planner import adapters, flops, sizes
from megatron_opd.planner.gpus import BYTES
from megatron_opd.planner.job import Job

_JSON_NUMBER = 25.0
"""Bytes of a hidden state's number in SGLang's JSON."""
_LISTED, _SAMPLED = 10.8, 34.0
"""Bytes of a listed id with its log-probability, and of a token besides. All three: `tools/bench_carriers.py`."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one kind in a step."""

    name: str
    path: str
    """Which link it takes, at best."""
    total: float
    """Of all who send."""
    a_rank: float
    """Sent by the busiest rank, or server."""


def carrier_bytes(teacher: TeacherConfig, arch: Architecture | None) -> float:
    """Bytes of a teacher's answer about one token; 0 for one on the trainer's ranks, where it stays."""
    if not teacher.is_served:
        return 0.0
    if teacher.carrier == "hidden":
        return _JSON_NUMBER * arch.hidden_size if arch else 0.0
    return _SAMPLED + (_LISTED * teacher.top_k if teacher.carrier == "topk" else 0.0)


def payload_bytes(teacher: TeacherConfig, arch: Architecture | None) -> float:
    """The same if it were sent as binary numbers: what the carrier is about."""
    if teacher.carrier == "hidden":
        return arch.hidden_size * BYTES[teacher.dtype] if arch else 0.0
    return 8.0 * teacher.top_k if teacher.carrier == "topk" else 4.0


def of_teachers(job: Job) -> dict[str, float]:
    """Bytes of a step by served teacher."""
    tokens = job.sequences * job.response
    both = zip(job.config.teachers, job.teachers, strict=True)
    return {
        teacher.name: tokens * flops.asked_share(job, teacher) * carrier_bytes(teacher, arch)
        for teacher, arch in both
        if teacher.is_served
    }


def weight_sync(job: Job) -> float:
    """Bytes of the student's weights, which every group of a server's tensor-parallel ranks gets once."""
    in_fp8 = job.config.rollout.quantization == "fp8"
    return sizes.served_bytes(job.student, BYTES[job.config.student.dtype], in_fp8=in_fp8)


def gradients(job: Job) -> float:
    """Bytes that a rank sends for the data-parallel reduction, rings assumed: reduce-scatter of float32 gradients and
    all-gather of weights (distributed optimizer), or an all-reduce."""
    config, replicas = job.config, job.config.parallel.context * job.config.parallel.data
    size = 4 + (BYTES[config.student.dtype] if config.optim.distributed else 4)
    trained = [adapters.trained(job.student, config.lora, config.parallel, stage) for stage in _stages(job)]
    mine = max(sizes.numel(parameters) for parameters in trained)
    return mine * size * (replicas - 1) / replicas


def _stages(job: Job) -> range:
    return range(job.config.parallel.pipeline)


def tensor_parallel(job: Job) -> float:
    """Bytes that a rank sends in one step for tensor parallelism: four all-reduces of an activation a layer, or as much
    by gathers and scatters with sequence parallelism; half as much again where layers are recomputed."""
    config = job.config
    tensor, layers = config.parallel.tensor, job.student.num_layers // config.parallel.pipeline
    activation = _activation(job) * (tensor - 1) / tensor
    return 2 * activation * layers * (6 if config.student.recompute == "full" else 4)


def context_parallel(job: Job) -> float:
    """Bytes that a rank sends in one step for context parallelism, rings assumed: its keys and values of every layer to
    each other rank of its sequences in every forward pass and, with their gradients, in the backward pass."""
    config, arch = job.config, job.student
    others, layers = config.parallel.context - 1, arch.num_layers // config.parallel.pipeline
    width = 2 * arch.num_kv_heads * arch.head_dim / config.parallel.tensor
    passes = 3 if config.student.recompute == "none" else 4
    return _tokens(job) * width * BYTES[config.student.dtype] * others * layers * passes


def pipeline(job: Job) -> float:
    """Bytes that a stage sends to the next and back in a step."""
    config = job.config
    split = config.parallel.tensor if config.parallel.sequence else 1
    return 2 * _activation(job) / split if config.parallel.pipeline > 1 else 0.0


def _activation(job: Job) -> float:
    """One [tokens, H] of a rank's part of all sequences of its replica."""
    return _tokens(job) * job.student.hidden_size * BYTES[job.config.student.dtype]


def _tokens(job: Job) -> float:
    """Of a rank's part of all sequences of its replica."""
    return job.sequences / job.config.parallel.data * job.through_trainer / job.config.parallel.context


def table(job: Job) -> list[Traffic]:
    """Everything, with what is nothing left out."""
    config, layout = job.config, job.config.parallel
    world = layout.world_size
    per_node = job.assumed.gpus_per_node
    ring = "node" if layout.tensor * layout.context <= per_node else "network"
    within = "node" if layout.tensor * layout.context * layout.data <= per_node else "network"
    found = [
        Traffic("tensor parallel", "node", tensor_parallel(job) * world, tensor_parallel(job)),
        Traffic("context parallel", ring, context_parallel(job) * world, context_parallel(job)),
        Traffic("pipeline", "node" if world <= per_node else "network", pipeline(job) * world, pipeline(job)),
        Traffic("gradients and weights over replicas", within, gradients(job) * world, gradients(job)),
    ]
    for name, size in of_teachers(job).items():
        found.append(Traffic(f"teacher {name} to leaders", "network", size, size / layout.data))
    if config.rollout.is_served:
        servers = config.rollout.servers
        copies = len(servers.urls) or servers.count
        found.append(Traffic("weights to servers", "network", weight_sync(job) * copies, weight_sync(job)))
    return [traffic for traffic in found if traffic.total]
