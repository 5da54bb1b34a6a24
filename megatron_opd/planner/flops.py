"""FLOPs of a step by stage. A product of [a, b] and [b, c] is 2abc; causal attention counts half of its square.

The trainer computes on padded sequences: all of a step are as long as its longest, for which the longest that the
config allows stands here. Servers, and the trainer where it packs sequences, compute on the tokens that there are.
"""

from __future__ import annotations

from megatron_opd.config import TeacherConfig
from megatron_opd.models.architecture import Architecture
from megatron_opd.planner import sizes
from megatron_opd.planner.job import Job


def body(arch: Architecture, length: float) -> float:
    """Of all layers on one sequence, forward."""
    return 2 * sizes.body_numel(arch) * length + attention(arch, length)


def attention(arch: Architecture, length: float) -> float:
    """The part of `body` that has no weights."""
    return 2 * arch.num_layers * arch.num_heads * arch.head_dim * length**2


def head(width: int, columns: int, rows: float) -> float:
    """Of an output head."""
    return 2.0 * width * columns * rows


def training(job: Job) -> float:
    """Student forward and backward, and the teachers' heads in the loss; of all replicas. Recomputing is work too."""
    rows, columns = job.sequences * job.response, job.student.padded_vocab_size
    length = job.through_trainer
    again = {"none": 0.0, "selective": attention(job.student, length), "full": body(job.student, length)}
    made = job.sequences * (_both_ways(job, length) + again[job.config.student.recompute])
    made += _passes(job) * head(job.student.hidden_size, columns, rows)
    for teacher, arch in job.telling_hidden:
        theirs = arch.padded_vocab_size if teacher.tokenizer == "own" else columns
        made += asked_share(job, teacher) * head(arch.hidden_size, theirs, rows)
    return made


def _passes(job: Job) -> int:
    """Products of a weight: forward, and the gradients of its input and, unless adapters are trained, of itself."""
    return 2 if job.config.lora.rank else 3


def _both_ways(job: Job, length: float) -> float:
    """Of the student's layers on one sequence, forward and backward, nothing recomputed; adapters are small."""
    scores = attention(job.student, length)
    return _passes(job) * (body(job.student, length) - scores) + 3 * scores


def model_training(job: Job) -> float:
    """The same without what is recomputed, padded, or asked of teachers: what MFU is measured by."""
    length = job.prompt + job.response
    logits = head(job.student.hidden_size, job.student.vocab_size, length)
    return job.sequences * (_both_ways(job, length) + _passes(job) * logits)


def scoring(job: Job, teacher: TeacherConfig, arch: Architecture) -> float:
    """A teacher's forward passes; one that is served and tells no hidden states computes its own head."""
    length = job.prompt + job.response if teacher.is_served else job.through_trainer
    made = body(arch, length)
    if teacher.carrier != "hidden":
        made += head(arch.hidden_size, arch.vocab_size, job.response)
    return job.sequences * asked_share(job, teacher) * made


def prefill(job: Job) -> float:
    """Reading the prompts, each once for all its samples."""
    return job.config.rollout.prompts_per_step * body(job.student, job.prompt)


def decoding(job: Job) -> float:
    """Sampling token by token."""
    last = body(job.student, job.prompt + job.response) - body(job.student, job.prompt)
    return job.sequences * (last + head(job.student.hidden_size, job.student.vocab_size, job.response))


def asked_share(job: Job, teacher: TeacherConfig) -> float:
    """The part of the answers that this teacher is asked about."""
    sources = job.config.data.train
    total = sum(source.weight for source in sources)
    if not total:
        return 1.0 if teacher.weight > 0 else 0.0
    return sum(s.weight for s in sources if teacher.weight_for(s.name) > 0) / total
