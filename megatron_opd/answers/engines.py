"""Engines for the teachers that sample: embedded for teachers on the trainer's ranks, else on the servers they have."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_opd.answers.choice import sampling_teacher
from megatron_opd.config import Config, TeacherConfig
from megatron_opd.config.checks_answers import sampling_teachers
from megatron_opd.types import RolloutEngine


def teacher_engines(config: Config, *, eos_ids: tuple[int, ...], vocab_size: int) -> dict[str, RolloutEngine]:
    """By name, those that answer prompts of `data.train`. A model is loaded once, whole, on this rank."""
    asked = {sampling_teacher(config, source.name).name for source in config.data.train} if config.teachers else set()
    return {
        teacher.name: _build(teacher, eos_ids, vocab_size)
        for _, teacher in sampling_teachers(config)
        if teacher.name in asked
    }


def mixed_engines(
    config: Config, engine: RolloutEngine, teachers: Mapping[str, RolloutEngine]
) -> dict[str, RolloutEngine]:
    """By name of the teacher, engines of the student mixed with it; none where nothing is mixed."""
    if not config.answers.teacher_mixed_alpha:
        return {}
    from megatron_opd.answers.mixed import MixedEngine
    from megatron_opd.rollout.local import LocalEngine

    made: dict[str, RolloutEngine] = {}
    for name, teacher in teachers.items():
        assert isinstance(engine, LocalEngine)
        assert isinstance(teacher, LocalEngine)
        made[name] = MixedEngine(engine, teacher, alpha=config.answers.teacher_mixed_alpha)
    return made


def _build(teacher: TeacherConfig, eos_ids: tuple[int, ...], vocab_size: int) -> RolloutEngine:
    if teacher.backend == "megatron":
        from megatron_opd.rollout.local import LocalEngine

        engine = LocalEngine(teacher.model, eos_ids=eos_ids, vocab_size=vocab_size)
        if not engine.has_weights:
            raise ValueError(
                f"teacher '{teacher.name}' is to sample, but {teacher.model} is a Megatron checkpoint, which the"
                " embedded engine cannot read: convert it with tools/convert_checkpoint.py megatron-to-hf"
            )
        return engine
    from megatron_opd.rollout.sglang import SGLangEngine
    from megatron_opd.sglang.loop import Loop
    from megatron_opd.sglang.pool import connect
    from megatron_opd.sglang.wire import Limits
    from megatron_opd.student.architecture import read_limits

    own, context = read_limits(teacher.model)
    pool = connect(teacher.servers, Limits(vocab_size=own, context=context), name=f"teacher '{teacher.name}'")
    return SGLangEngine(pool, Loop(), None, eos_ids=eos_ids, vocab_size=vocab_size)
