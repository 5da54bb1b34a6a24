"""GPU memory of a rank by part, and the moment of a step at which it is highest.

What is always there: weights, gradients, optimizer, teachers, their heads, an embedded engine. On top of that come, one
after the other, the cache of the engine that samples, the teachers' hidden states, and the student's forward and
backward passes with the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron_opd.config import TeacherConfig
from megatron_opd.models.architecture import Architecture
from megatron_opd.planner import activations, adapters, loss_buffers, sizes
from megatron_opd.planner.activations import ForwardPass
from megatron_opd.planner.gpus import BYTES
from megatron_opd.planner.job import Job, gpus_of
from megatron_opd.precision.fp8_plan import LINEARS, teacher_plan
from megatron_opd.sglang.weights.transports import WAYS

ENGINE_ROWS, ENGINE_CACHE = 256, 2**30
"""Sequences that the embedded engine decodes together at most, and bytes of their cache (more for a single one)."""
_ENGINE_TOKENS = 4096
"""Tokens of prompts that it reads together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes of one rank."""

    stage: int
    always: dict[str, float]
    moments: dict[str, dict[str, float]] = field(default_factory=dict)
    """What is there besides while the step samples, scores and trains; by part."""

    @property
    def peak_at(self) -> str:
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def parts(self) -> dict[str, float]:
        """At the peak, without what is not there."""
        found = {**self.always, **self.moments[self.peak_at]}
        return {name: value for name, value in found.items() if value}

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def trainer(job: Job) -> list[RankMemory]:
    """The first tensor-parallel rank of every pipeline stage of a replica; its peers have the same, but no engine."""
    return [_rank(job, stage) for stage in range(job.config.parallel.pipeline)]


def worst(job: Job) -> RankMemory:
    """The rank that needs most."""
    return max(trainer(job), key=lambda rank: rank.total)


def resting(job: Job) -> float:
    """Bytes that the rank with the most keeps on its GPU while nothing is computed."""
    return max(sum(rank.always.values()) for rank in trainer(job))


def fits(job: Job) -> bool:
    """Whether every rank of the trainer has room on its GPU."""
    return worst(job).total <= job.gpu.memory * job.assumed.usable


def _rank(job: Job, stage: int) -> RankMemory:
    config = job.config
    trained = adapters.trained(job.student, config.lora, config.parallel, stage)
    held = sizes.buffers(trained, config.parallel, distributed=config.optim.distributed)
    frozen = sizes.numel(sizes.stage_parameters(job.student, config.parallel, stage)) if config.lora.rank else 0
    is_last = stage == config.parallel.pipeline - 1
    resting, moving = _teacher_weights(job, stage)
    engine, sampling = _engine(job) if stage == 0 else (0.0, {})
    always = {
        "weights": (frozen + held.gradients) * BYTES[config.student.dtype],
        "gradients": 4 * held.gradients,
        "optimizer": held.optimized * (12 if BYTES[config.student.dtype] == 2 else 8),
        "teacher weights": resting,
        "teacher heads": _teacher_heads(job) if is_last else 0,
        "engine weights": engine,
        "servers' contexts": _contexts(job) if stage == 0 else 0.0,
    }
    hidden = _hidden_states(job) if is_last else 0.0
    kept = under_way(job, stage)
    return RankMemory(
        stage=stage,
        always=always,
        moments={
            "the loss": {
                "hidden states": hidden,
                "activations": kept,
                "loss": loss_buffers.peak(job) if is_last else 0.0,
            },
            "the backward pass": {"hidden states": hidden, "activations": kept + activations.backward(one_pass(job))},
            "scoring": {
                "teachers fetched": moving,
                "hidden states": 2 * hidden,  # rollout by rollout, and put together in micro-batches
                "activations": _scoring(job),
            },
            "sampling": sampling,
        },
    )


def one_pass(job: Job) -> ForwardPass:
    """A micro-batch through a stage of the student: the largest there may be, which packing does not make smaller."""
    config = job.config
    return ForwardPass(
        arch=job.student,
        parallel=config.parallel,
        student=config.student,
        lora=config.lora,
        sequences=config.train.micro_batch_size,
        length=job.longest // config.parallel.context,
        on_gpu=job.on_gpu,
    )


def under_way(job: Job, stage: int) -> float:
    """Activations of the micro-batches that are between forward and backward pass (one forward, one backward)."""
    stages = job.config.parallel.pipeline
    kept = activations.saved(one_pass(job), is_first=stage == 0, is_last=stage == stages - 1)
    return kept * min(job.micro_batches, stages - stage)


def _scoring(job: Job) -> float:
    """The largest tensors of one layer of a teacher's forward pass, which keeps nothing."""
    config, found = job.config, [0.0]
    for teacher, arch in job.inside:
        widest = arch.num_heads * arch.head_dim + 2 * arch.num_kv_heads * arch.head_dim + 3 * arch.ffn_size
        a_token = 3 * arch.hidden_size + widest / config.parallel.tensor
        length = job.longest // config.parallel.context
        found.append(config.train.micro_batch_size * length * a_token * BYTES[teacher.dtype])
    return max(found)


def _teacher_weights(job: Job, stage: int) -> tuple[float, float]:
    """(bytes that stay, most bytes that are there at a time for teachers that score: with the next one's, where it is
    fetched meanwhile)."""
    resting, moving, before = 0.0, 0.0, 0.0
    for teacher, arch in job.inside:
        parameters = [p for p in sizes.stage_parameters(arch, job.config.parallel, stage) if p.name != "head"]
        size = sizes.numel(parameters) * BYTES[teacher.dtype] - _saved_by_fp8(job, teacher, arch, stage)
        if teacher.offload:
            moving = max(moving, size + (before if teacher.prefetch else 0.0))
            before = size
        else:
            resting += size
    return resting, moving


def _saved_by_fp8(job: Job, teacher: TeacherConfig, arch: Architecture, stage: int) -> float:
    """Bytes that a teacher on the ranks has less for matrices that stay in FP8 between passes."""
    plan = teacher_plan(job.config.precision, teacher, job.config.parallel, arch)
    if not plan.resident:
        return 0.0
    layers = arch.num_layers // job.config.parallel.pipeline
    rounded = [i for i in range(stage * layers, (stage + 1) * layers) if plan.of(LINEARS[0].replace("*", str(i)))]
    made = [p for p in sizes.stage_parameters(arch, job.config.parallel, stage) if p.name in sizes.MATRICES]
    return sizes.numel(made) * len(rounded) / layers * (BYTES[teacher.dtype] - 1)


def _teacher_heads(job: Job) -> float:
    """Rows of this rank's shard of the student's vocabulary, of every teacher that tells hidden states; of a teacher's
    own, where it has a tokenizer of its own. A head in FP8 has one byte a number, unless that is emulated."""
    tensor, found = job.config.parallel.tensor, 0.0
    for teacher, arch in job.telling_hidden:
        whose = arch if teacher.tokenizer == "own" else job.student
        size = 1 if loss_buffers.is_scaled(job, teacher, arch) else BYTES[teacher.dtype]
        found += -(-whose.padded_vocab_size // tensor) * arch.hidden_size * size
    return found


def _hidden_states(job: Job) -> float:
    """Of all answers of a replica's step, which are whole on every context-parallel rank."""
    tokens = job.sequences / job.config.parallel.data * job.config.most_sampled
    return sum(tokens * arch.hidden_size * BYTES[teacher.dtype] for teacher, arch in job.telling_hidden)


def _contexts(job: Job) -> float:
    """Bytes of CUDA contexts on rank 0's GPU for servers elsewhere that read weights there (CUDA IPC): every rank of
    theirs opens that GPU. One of colocated servers is there anyway."""
    rollout = job.config.rollout
    if not (rollout.is_served and WAYS[rollout.sync].is_local and job.on_gpu):
        return 0.0
    return job.assumed.context * (gpus_of(rollout.servers) - int(rollout.servers.colocated))


def engine_rows(job: Job) -> int:
    """Sequences that the embedded engine decodes together."""
    size = BYTES[job.config.rollout.dtype]
    fitting = int(ENGINE_CACHE // (job.longest * cache_bytes(job.student, size, 1)))
    return max(min(math.ceil(job.sequences / job.config.parallel.data), ENGINE_ROWS, fitting), 1)


def _engine(job: Job) -> tuple[float, dict[str, float]]:
    """(weights, what comes on top while it samples) of the embedded engine, which is whole on the leader of each
    replica."""
    if job.config.rollout.is_served:
        return 0.0, {}
    arch, rows, size = job.student, engine_rows(job), BYTES[job.config.rollout.dtype]
    reading = _ENGINE_TOKENS * (3 * arch.hidden_size + 3 * arch.ffn_size) * size
    drawing = rows * arch.vocab_size * (3 * 4 + 8)  # logits, their log-softmax and exponential; sums in float64
    return size * sizes.numel(sizes.whole(arch)), {
        "engine cache": rows * job.longest * cache_bytes(arch, size, 1),
        "engine's passes": max(reading, drawing),
    }


def cache_bytes(arch: Architecture, size: int, tensor: int) -> float:
    """Bytes of keys and values of one token on one of `tensor` GPUs, numbers of `size` bytes."""
    heads = max(arch.num_kv_heads / tensor, 1)
    return 2 * heads * arch.head_dim * arch.num_layers * size
