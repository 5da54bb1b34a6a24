"""What the loss needs on the last stage beyond the activations, at its worst moment.

Letters: S positions of a micro-batch, T response tokens of it, C tokens of a chunk, L columns of this rank, z bytes of
a logit. Megatron gives bf16 logits out as float32.
"""

from __future__ import annotations

from megatron_opd.planner.gpus import BYTES
from megatron_opd.planner.job import Job

_READABLE = 8
"""Float32 [C, L] tensors that live at one time in `objective.py`, where not all teachers tell hidden states."""


def peak(job: Job) -> float:
    """Bytes."""
    config = job.config
    columns = job.student.padded_vocab_size // config.parallel.tensor
    positions = config.train.micro_batch_size * job.longest
    tokens = config.train.micro_batch_size * config.rollout.max_new_tokens
    buffers = _chunks(job, min(config.loss.chunk_tokens, tokens), columns)
    size = BYTES[config.student.dtype]
    if job.logits == "chunked" and is_exact(job):
        hidden = 2 * tokens * job.student.hidden_size * size  # the rows that count, and their gradient
        return hidden + buffers
    whole, rows = positions * columns, tokens * columns
    forward = whole * (2 * size if size == 4 else 4 + size)  # the head's output and what it becomes
    kept = rows if is_exact(job) else 2 * rows  # the gradient takes the logits' place, or is made beside them
    loss = 4 * whole + 4 * kept + buffers
    scattered = 4 * rows + 4 * whole  # the gradient of rows, and of all positions
    weight = columns * job.student.hidden_size * size
    reordered = 2 * size * whole + weight  # as the head has them, and what becomes of it
    return max(forward, loss, scattered, reordered if size == 4 else max(reordered, 6 * whole))


def is_exact(job: Job) -> bool:
    """Whether the fused loss computes it."""
    teachers = job.config.teachers
    return job.config.loss.kind == "distribution" and all(t.carrier == "hidden" for t in teachers)


def _chunks(job: Job, tokens: int, columns: int) -> float:
    """Logits of the teachers for a chunk of tokens; twice where exchanges between ranks overlap with products."""
    if not is_exact(job):
        return _READABLE * 4 * tokens * columns
    made = sum(BYTES[t.dtype] for t in job.config.teachers)
    if job.logits == "chunked":
        made += BYTES[job.config.student.dtype]
    return made * tokens * columns * (2 if job.config.parallel.tensor > 1 else 1)
