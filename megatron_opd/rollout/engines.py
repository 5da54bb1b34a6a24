"""Builds who answers: the student's engine, the teachers that sample, and the two mixed.

The only place that knows which engines there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.config import Config, TeacherConfig
from megatron_opd.config.checks_answers import sampling_teachers
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.types import RolloutEngine
from megatron_opd.rollout.answers import Answers, sampling_teacher

if TYPE_CHECKING:
    from megatron_opd.rollout.served_engine import WeightSync
    from megatron_opd.sglang.event_loop import Loop


def build_engine(config: Config, parallel: Parallel, *, eos_ids: tuple[int, ...], vocab_size: int) -> RolloutEngine:
    """The engine of `rollout.engine`, for the leader of a replica. Only ids below `vocab_size` are sampled."""
    if config.rollout.engine == "local":
        from megatron_opd.rollout.embedded_engine import LocalEngine

        return LocalEngine(config.student.model, eos_ids=eos_ids, vocab_size=vocab_size)
    from megatron_opd.models.architecture import read_limits
    from megatron_opd.rollout.served_engine import SGLangEngine
    from megatron_opd.sglang.event_loop import Loop
    from megatron_opd.sglang.pool import connect
    from megatron_opd.sglang.wire import ServerLimits

    loop = Loop()
    sync = _weight_sync(config, parallel, loop)
    own, context = read_limits(config.student.model)
    limits = ServerLimits(vocab_size=own, context=context)
    pool = connect(config.rollout.servers, limits, name="rollout.servers", on_return=sync.give)
    # A replica that does not push itself may be told of new weights a moment before the servers have them.
    lag = 0 if parallel.is_main or config.rollout.max_staleness == 0 else 1
    partly = config.rollout.partial
    return SGLangEngine(pool, loop, sync, eos_ids=eos_ids, vocab_size=vocab_size, partial=partly, lag=lag)


def _weight_sync(config: Config, parallel: Parallel, loop: Loop) -> WeightSync:
    """One replica pushes the weights: all of them sample from the same servers."""
    from megatron_opd.models import hf_dir
    from megatron_opd.sglang.follow import Follow
    from megatron_opd.sglang.weights.sync import WeightPush

    if not parallel.is_main:
        return Follow()
    model = config.student.model
    write = partial(hf_dir.write, like=model)
    return WeightPush(config.rollout, loop, model=model, write=write, spool=Path(config.run.dir) / "weights")


def build_answers(config: Config, engine: RolloutEngine, *, eos_ids: tuple[int, ...], vocab_size: int) -> Answers:
    """For the leader of a replica; `engine` samples from the student. Loads the models of teachers that sample.

    Raises ValueError for a teacher whose weights cannot be loaded.
    """
    teachers = teacher_engines(config, eos_ids=eos_ids, vocab_size=vocab_size)
    return Answers(config, engine, teachers, mixed_engines(config, engine, teachers), eos_ids=eos_ids)


def teacher_engines(config: Config, *, eos_ids: tuple[int, ...], vocab_size: int) -> dict[str, RolloutEngine]:
    """By name, those that answer prompts of `data.train`. A model is loaded once, whole, on this rank."""
    asked = {sampling_teacher(config, source.name).name for source in config.data.train} if config.teachers else set()
    return {
        teacher.name: _build(teacher, eos_ids, vocab_size)
        for _, teacher in sampling_teachers(config.answers, config.teachers)
        if teacher.name in asked
    }


def mixed_engines(
    config: Config, engine: RolloutEngine, teachers: Mapping[str, RolloutEngine]
) -> dict[str, RolloutEngine]:
    """By name of the teacher, engines of the student mixed with it; none where nothing is mixed."""
    if not config.answers.teacher_mixed_alpha:
        return {}
    from megatron_opd.rollout.embedded_engine import LocalEngine
    from megatron_opd.rollout.mixed import MixedEngine

    made: dict[str, RolloutEngine] = {}
    for name, teacher in teachers.items():
        assert isinstance(engine, LocalEngine)
        assert isinstance(teacher, LocalEngine)
        made[name] = MixedEngine(engine, teacher, alpha=config.answers.teacher_mixed_alpha)
    return made


def _build(teacher: TeacherConfig, eos_ids: tuple[int, ...], vocab_size: int) -> RolloutEngine:
    if teacher.backend == "megatron":
        from megatron_opd.rollout.embedded_engine import LocalEngine

        engine = LocalEngine(teacher.model, eos_ids=eos_ids, vocab_size=vocab_size)
        if not engine.has_weights:
            raise ValueError(
                f"teacher '{teacher.name}' is to sample, but {teacher.model} is a Megatron checkpoint, which the"
                " embedded engine cannot read: convert it with tools/convert_checkpoint.py megatron-to-hf"
            )
        return engine
    from megatron_opd.models.architecture import read_limits
    from megatron_opd.rollout.served_engine import SGLangEngine
    from megatron_opd.sglang.event_loop import Loop
    from megatron_opd.sglang.pool import connect
    from megatron_opd.sglang.wire import ServerLimits

    own, context = read_limits(teacher.model)
    pool = connect(teacher.servers, ServerLimits(vocab_size=own, context=context), name=f"teacher '{teacher.name}'")
    return SGLangEngine(pool, Loop(), None, eos_ids=eos_ids, vocab_size=vocab_size)
