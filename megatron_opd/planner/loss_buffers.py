"""What the loss needs on the last stage beyond the activations, at its worst moment.

Letters: S positions of a micro-batch, T response tokens of it, C tokens of a chunk, D hidden size, L columns of this
rank, z bytes of the student's numbers. Logits and their gradients are float32.

    fused       C rows of every model's logits, twice where exchanges overlap with products; no [T, L] at all
    otherwise   the student's logits [T, L], a gradient [T, L] of every term, and what a chunk of the term at work
                takes; the fused loss of teachers' hidden states leaves its gradient in the logits' place
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opd.config import TeacherConfig
from megatron_opd.models.architecture import Architecture
from megatron_opd.planner.gpus import BYTES
from megatron_opd.planner.job import Job
from megatron_opd.precision.fp8_plan import student_plan, teacher_plan

_SAMPLED = 5
"""Float32 [C, L] tensors that live at one time in `loss/sampled_tokens.py`."""
_READABLE, _ALONE, _OF_SEVERAL = 7, 2, 3
"""The same in `loss/distillation.py`; besides for a teacher that tells hidden states, alone or each of several. Lists
of ids take one more."""
_ROUNDING = 14
"""Bytes of each number of hidden states [C, D] while a teacher's head in FP8 rounds them."""
_CROSSING = 8
"""Float32 [C, V] tensors of a whole vocabulary V in `crosstok/`: roughly, for sorting has buffers of its own."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Of a micro-batch, by the letters above."""

    positions: int
    tokens: int
    chunk: int
    hidden: int
    columns: int
    size: int

    @classmethod
    def of(cls, job: Job) -> _Sizes:
        config = job.config
        length = job.longest // config.parallel.context
        tokens = config.train.micro_batch_size * min(config.most_sampled, length)
        return cls(
            positions=config.train.micro_batch_size * length,
            tokens=tokens,
            chunk=min(config.loss.chunk_tokens, tokens),
            hidden=job.student.hidden_size,
            columns=job.student.padded_vocab_size // config.parallel.tensor,
            size=BYTES[config.student.dtype],
        )


def peak(job: Job) -> float:
    """Bytes."""
    sizes = _Sizes.of(job)
    output = sizes.positions * sizes.hidden * sizes.size  # of the model: hidden states of all positions
    return output + (_fused(job, sizes) if takes_hidden(job) else _of_logits(job, sizes))


def takes_hidden(job: Job) -> bool:
    """Whether the student's logits exist a chunk at a time only: as `Objective.takes_hidden`, and its head is not
    rounded."""
    config = job.config
    plan = student_plan(config.precision, config.student, config.parallel, job.student)
    return is_exact(job) and not _has_sampled_terms(job) and plan.head_products is None


def is_exact(job: Job) -> bool:
    """Whether the fused loss computes the distillation term."""
    config = job.config
    hidden = all(t.carrier == "hidden" for t in config.teachers)
    return config.loss.kind == "distribution" and hidden and not config.crosses_tokenizers


def is_scaled(job: Job, teacher: TeacherConfig, arch: Architecture) -> bool:
    """Whether the output head of a teacher that tells hidden states is in FP8 proper."""
    plan = teacher_plan(job.config.precision, teacher, job.config.parallel, arch)
    return plan.head_products is not None and not plan.emulate


def _has_sampled_terms(job: Job) -> bool:
    """Whether there are terms in the sampled tokens' log-probabilities alone."""
    return job.config.has_policy_gradient or job.config.answers.lmbda < 1


def _fused(job: Job, sizes: _Sizes) -> float:
    """Hidden states [T, D] and their gradient, and a chunk's logits; the head's gradient goes where it is summed."""
    made = 2 * sizes.tokens * sizes.hidden * sizes.size + _buffers(job, sizes, with_student=True)
    if sizes.size == 2 and not job.on_gpu and not job.config.lora.rank:
        made += 4 * sizes.chunk * (sizes.columns + sizes.hidden)  # CPUs have no bf16 product with a float32 sum
    return made


def _of_logits(job: Job, sizes: _Sizes) -> float:
    """Hidden states [T, D], and the highest of: making logits, each term, the gradients' way back to hidden states and
    head."""
    whole, size = sizes.tokens * sizes.columns, sizes.size
    others, learns = int(_has_sampled_terms(job)), int(job.config.loss.weight > 0)
    own = 0 if is_exact(job) else learns
    made = [
        whole * (4 if size == 4 else 4 + size),
        4 * whole * (1 + others) + others * _SAMPLED * 4 * sizes.chunk * sizes.columns,
        4 * whole * (1 + others + own) + _distilling(job, sizes),
        4 * whole * (learns + 2 * others if is_exact(job) else 1 + learns + others),
        whole * size + (0 if job.config.lora.rank else sizes.columns * sizes.hidden * size),
    ]
    return sizes.tokens * sizes.hidden * size + max(made)


def _distilling(job: Job, sizes: _Sizes) -> float:
    """What a chunk of the distillation term takes."""
    config, tensor = job.config, job.config.parallel.tensor
    if is_exact(job):
        return _buffers(job, sizes, with_student=False)
    if config.crosses_tokenizers:
        theirs = max((arch.padded_vocab_size for arch in job.teachers if arch is not None), default=0)
        return _CROSSING * 4 * sizes.chunk * (sizes.columns * tensor + theirs)
    carriers = [t.carrier for t in config.teachers]
    of_hidden = carriers.count("hidden") * (_ALONE if len(carriers) == 1 else _OF_SEVERAL)
    return (_READABLE + of_hidden + ("topk" in carriers)) * 4 * sizes.chunk * sizes.columns


def _buffers(job: Job, sizes: _Sizes, *, with_student: bool) -> float:
    """Logits of a chunk of tokens in the fused loss."""
    made = sum(BYTES[t.dtype] for t in job.config.teachers) + (sizes.size if with_student else 0)
    overlaps = job.config.parallel.tensor > 1 and sizes.tokens > sizes.chunk
    scaled = [arch.hidden_size for teacher, arch in job.telling_hidden if is_scaled(job, teacher, arch)]
    return made * sizes.chunk * sizes.columns * (2 if overlaps else 1) + _ROUNDING * sizes.chunk * max(
        scaled, default=0
    )
