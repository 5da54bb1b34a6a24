"""Builds who answers: the student's engine, the teachers that sample, and the two mixed.

The only place that knows which engines there are. What settings and planner must know of each is in
`config/rollout_engines.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.config import Config, RolloutConfig, TeacherConfig
from megatron_opd.config.checks_answers import sampling_teachers
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.protocols import RolloutEngine
from megatron_opd.rollout.answers import Answers, Choice

if TYPE_CHECKING:
    from megatron_opd.core.event_loop import Loop
    from megatron_opd.rollout.mixed import MixedEngine
    from megatron_opd.rollout.served_engine import WeightSync
    from megatron_opd.sglang.wire import ServerLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInputs:
    """What an engine for the student is built from."""

    model: str
    """`student.model`."""
    rollout: RolloutConfig
    """With the urls of its servers."""
    run_dir: str
    eos_ids: tuple[int, ...]
    vocab_size: int
    """Only ids below are sampled."""
    pushes: bool
    """Whether this replica gives servers that all replicas share their weights; the others follow it."""


def build_engine(config: Config, parallel: Parallel, *, eos_ids: tuple[int, ...], vocab_size: int) -> RolloutEngine:
    """The engine of `rollout.engine`, for the leader of a replica. Only ids below `vocab_size` are sampled."""
    inputs = EngineInputs(
        model=config.student.model,
        rollout=config.rollout,
        run_dir=config.run.dir,
        eos_ids=eos_ids,
        vocab_size=vocab_size,
        pushes=parallel.is_main,
    )
    return BUILDERS[config.rollout.engine](inputs)


def _embedded(inputs: EngineInputs) -> RolloutEngine:
    from megatron_opd.rollout.embedded_engine import LocalEngine

    dtype = inputs.rollout.dtype
    return LocalEngine(inputs.model, eos_ids=inputs.eos_ids, vocab_size=inputs.vocab_size, dtype=dtype)


def _served(inputs: EngineInputs) -> RolloutEngine:
    from megatron_opd.core.event_loop import Loop
    from megatron_opd.rollout.served_engine import SGLangEngine
    from megatron_opd.sglang.pool import connect

    rollout, loop = inputs.rollout, Loop()
    sync = _weight_sync(inputs, loop)
    pool = connect(rollout.servers, _limits(inputs.model), name="rollout.servers", on_return=sync.give)
    # A replica that does not push itself may be told of new weights a moment before the servers have them.
    lag = 0 if inputs.pushes or rollout.max_staleness == 0 else 1
    ids = {"eos_ids": inputs.eos_ids, "vocab_size": inputs.vocab_size}
    return SGLangEngine(pool, loop, sync, **ids, partial=rollout.partial, lag=lag)


BUILDERS: dict[str, Callable[[EngineInputs], RolloutEngine]] = {"local": _embedded, "sglang": _served}
"""By the name in `rollout.engine`."""


def _weight_sync(inputs: EngineInputs, loop: Loop) -> WeightSync:
    """One replica pushes the weights: all of them sample from the same servers."""
    from megatron_opd.models import hf_dir
    from megatron_opd.sglang.follow import Follow
    from megatron_opd.sglang.weights.sync import WeightPush

    if not inputs.pushes:
        return Follow()
    write = partial(hf_dir.write, like=inputs.model)
    spool = Path(inputs.run_dir) / "weights"
    return WeightPush(inputs.rollout, loop, model=inputs.model, write=write, spool=spool)


def _limits(model: str) -> ServerLimits:
    from megatron_opd.models.architecture import read_limits
    from megatron_opd.sglang.wire import ServerLimits

    vocab_size, context = read_limits(model)
    return ServerLimits(vocab_size=vocab_size, context=context)


def build_answers(config: Config, engine: RolloutEngine, *, eos_ids: tuple[int, ...], vocab_size: int) -> Answers:
    """For the leader of a replica; `engine` samples from the student. Loads the models of teachers that sample.

    Raises ValueError for a teacher whose weights cannot be loaded.
    """
    choice = Choice(answers=config.answers, teachers=config.teachers, seed=config.run.seed)
    sources = [source.name for source in config.data.train]
    asked = {choice.teacher(source).name for source in sources} if config.teachers else set()
    # A model is loaded once, whole, on this rank.
    teachers = {
        teacher.name: build_sampling_teacher(teacher, eos_ids=eos_ids, vocab_size=vocab_size)
        for _, teacher in sampling_teachers(config.answers, config.teachers)
        if teacher.name in asked
    }
    mixed = mixed_engines(engine, teachers, alpha=config.answers.teacher_mixed_alpha)
    return Answers(choice, engine, teachers, mixed, eos_ids=eos_ids)


def mixed_engines(
    engine: RolloutEngine, teachers: Mapping[str, RolloutEngine], *, alpha: float
) -> dict[str, MixedEngine]:
    """By name of the teacher, engines of the student mixed with it; none where nothing is mixed (`alpha` 0)."""
    if not alpha:
        return {}
    from megatron_opd.rollout.embedded_engine import LocalEngine
    from megatron_opd.rollout.mixed import MixedEngine

    made: dict[str, MixedEngine] = {}
    for name, teacher in teachers.items():
        assert isinstance(engine, LocalEngine)
        assert isinstance(teacher, LocalEngine)
        made[name] = MixedEngine(engine, teacher, alpha=alpha)
    return made


def build_sampling_teacher(teacher: TeacherConfig, *, eos_ids: tuple[int, ...], vocab_size: int) -> RolloutEngine:
    """A teacher as an engine that samples, always from the same weights."""
    if teacher.is_served:
        return _served_teacher(teacher, eos_ids, vocab_size)
    from megatron_opd.rollout.embedded_engine import LocalEngine

    engine = LocalEngine(teacher.model, eos_ids=eos_ids, vocab_size=vocab_size)
    if not engine.has_weights:
        raise ValueError(
            f"teacher '{teacher.name}' is to sample, but {teacher.model} is a Megatron checkpoint, which the"
            " embedded engine cannot read: convert it with `megatron-opd convert megatron-to-hf`"
        )
    return engine


def _served_teacher(teacher: TeacherConfig, eos_ids: tuple[int, ...], vocab_size: int) -> RolloutEngine:
    from megatron_opd.core.event_loop import Loop
    from megatron_opd.rollout.served_engine import SGLangEngine
    from megatron_opd.sglang.pool import connect

    pool = connect(teacher.servers, _limits(teacher.model), name=f"teacher '{teacher.name}'")
    return SGLangEngine(pool, Loop(), None, eos_ids=eos_ids, vocab_size=vocab_size)
