"""The models that score the student's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial

from megatron_opd.config import Config, ParallelConfig, PrecisionConfig, TeacherConfig, TrainConfig
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.scores import TeacherScore
from megatron_opd.core.types import Rollout
from megatron_opd.core.vocab import VocabShard
from megatron_opd.precision.fp8_plan import ModelPlan, teacher_plan
from megatron_opd.teachers.offload import in_turn
from megatron_opd.teachers.rounded_head import RoundedHead
from megatron_opd.teachers.scorer import TeacherScorer

Loading = Callable[[TeacherConfig], AbstractContextManager[object]]
"""Shows somebody that a teacher is being built."""


def build_teachers(
    config: Config, parallel: Parallel, vocab: VocabShard, *, loading: Loading = lambda _: nullcontext()
) -> list[TeacherScorer]:
    """All teachers of the config, in its order. `vocab` is this rank's shard of the student's vocabulary; each is built
    within `loading` of its settings."""
    made = []
    for teacher in config.teachers:
        with loading(teacher):
            made.append(build_teacher(teacher, config, parallel, vocab))
    return made


def build_teacher(
    teacher: TeacherConfig, config: Config, parallel: Parallel, vocab: VocabShard, *, in_fp8: bool = True
) -> TeacherScorer:
    """One of them, or without FP8 what it would be without."""
    build = partial(BUILDERS[teacher.backend], teacher, config.train, parallel)
    if teacher.tokenizer == "own":
        return _foreign(teacher, config.student.model, build, parallel, vocab)
    plan = fp8_plan(teacher, config.precision, config.parallel) if in_fp8 else None
    made = build(vocab, plan)
    if plan is None or plan.head_products is None or not plan.emulate:
        return made
    return RoundedHead(made, plan.head_products)


def fp8_plan(teacher: TeacherConfig, precision: PrecisionConfig, layout: ParallelConfig) -> ModelPlan | None:
    """What of a teacher computes in FP8; None: nothing, because FP8 is off or its servers tell no hidden states."""
    if teacher.carrier != "hidden" or not precision.fp8.is_on:
        return None
    from megatron_opd.models.architecture import read_architecture

    arch = read_architecture(teacher.model, vocab_multiple=layout.tensor)
    return teacher_plan(precision, teacher, layout, arch)


_Build = Callable[[VocabShard, ModelPlan | None], TeacherScorer]
"""(the shard along which its head is cut, what computes in FP8) -> the scorer of the teacher's own tokens."""


def _foreign(
    teacher: TeacherConfig, student_model: str, build: _Build, parallel: Parallel, vocab: VocabShard
) -> TeacherScorer:
    """A teacher that reads the student's text in tokens of its own; its head is cut along its own vocabulary."""
    from megatron_opd.loss.crosstok.align import Translator
    from megatron_opd.loss.crosstok.matched import match
    from megatron_opd.loss.crosstok.pieces import read_pieces
    from megatron_opd.models.architecture import read_architecture
    from megatron_opd.models.tokenizer import load_tokenizer
    from megatron_opd.teachers.foreign_teacher import ForeignTeacher

    arch = read_architecture(teacher.model, vocab_multiple=parallel.tensor_size)
    columns = arch.padded_vocab_size // parallel.tensor_size
    start = columns * parallel.tensor_rank
    theirs = VocabShard(start, start + columns, arch.vocab_size, vocab.group)
    tokenizers = load_tokenizer(student_model), load_tokenizer(teacher.model)
    student, other = ((tokenizer, read_pieces(tokenizer)) for tokenizer in tokenizers)
    return ForeignTeacher(
        build(theirs, None),
        Translator(*student, *other),
        vocab=theirs,
        matched=match(student, other, (vocab.size, arch.vocab_size)),
    )


def ask_all(
    teachers: Sequence[TeacherScorer], rollouts: list[Rollout], weights: Sequence[Sequence[float]]
) -> list[list[TeacherScore | None]]:
    """By teacher, the scores of the rollouts where its weight is above 0, None for the others; `weights` by rollout.

    Every teacher is asked, in order, also about nothing: that may be a collective. While one scores, the weights of the
    next one that is wanted come from host memory.
    """
    wanted = [[w[n] > 0 for w in weights] for n in range(len(teachers))]
    fetched = [t.offloaded if any(w) else None for t, w in zip(teachers, wanted, strict=True)]
    # Where one fails, the others' weights go back at once.
    with closing(in_turn(fetched)) if any(fetched) else nullcontext(range(len(teachers))) as turns:
        return [_ask(teachers[n], rollouts, wanted[n]) for n in turns]


def _ask(teacher: TeacherScorer, rollouts: list[Rollout], wanted: list[bool]) -> list[TeacherScore | None]:
    scores = iter(teacher.score([r for r, want in zip(rollouts, wanted, strict=True) if want]))
    return [next(scores) if want else None for want in wanted]


def _in_process(
    teacher: TeacherConfig, train: TrainConfig, parallel: Parallel, vocab: VocabShard, plan: ModelPlan | None
) -> TeacherScorer:
    from megatron_opd.teachers.megatron_teacher import MegatronTeacher

    how = {"micro_batch_size": train.micro_batch_size, "packs": train.packing}
    return MegatronTeacher(teacher, parallel, vocab, **how, plan=plan)


def _served(
    teacher: TeacherConfig, _: TrainConfig, parallel: Parallel, vocab: VocabShard, plan: ModelPlan | None
) -> TeacherScorer:
    from megatron_opd.core.event_loop import Loop
    from megatron_opd.models.architecture import read_limits
    from megatron_opd.sglang.pool import connect
    from megatron_opd.sglang.wire import ServerLimits
    from megatron_opd.teachers.head_shard import load_head
    from megatron_opd.teachers.served_teacher import SGLangTeacher

    head_LD = load_head(teacher, parallel, vocab, plan) if teacher.carrier == "hidden" else None
    if not parallel.is_leader:
        return SGLangTeacher(teacher, parallel, None, None, head_LD=head_LD)
    own, context = read_limits(teacher.model)
    limits = ServerLimits(vocab_size=own, context=context)
    pool = connect(teacher.servers, limits, name=f"teacher '{teacher.name}'")
    return SGLangTeacher(teacher, parallel, pool, Loop(), head_LD=head_LD)


BUILDERS: dict[str, Callable[..., TeacherScorer]] = {"megatron": _in_process, "sglang": _served}
"""By the name in `teachers.N.backend`."""
