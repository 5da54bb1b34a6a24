"""Where the student's answers come from."""

from __future__ import annotations

from megatron_opd.config import Config
from megatron_opd.parallel import Parallel
from megatron_opd.types import RolloutEngine


def build_engine(config: Config, parallel: Parallel, *, eos_ids: tuple[int, ...], vocab_size: int) -> RolloutEngine:
    """The engine of `rollout.engine`, for the leader of a replica. Only ids below `vocab_size` are sampled."""
    from megatron_opd.rollout.local import LocalEngine

    return LocalEngine(config.student.model, eos_ids=eos_ids, vocab_size=vocab_size)
