"""Where the student's answers come from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.config import Config
from megatron_opd.parallel import Parallel
from megatron_opd.types import RolloutEngine

if TYPE_CHECKING:
    from megatron_opd.rollout.sglang import WeightSync
    from megatron_opd.sglang.loop import Loop


def build_engine(config: Config, parallel: Parallel, *, eos_ids: tuple[int, ...], vocab_size: int) -> RolloutEngine:
    """The engine of `rollout.engine`, for the leader of a replica. Only ids below `vocab_size` are sampled."""
    if config.rollout.engine == "local":
        from megatron_opd.rollout.local import LocalEngine

        return LocalEngine(config.student.model, eos_ids=eos_ids, vocab_size=vocab_size)
    from megatron_opd.rollout.sglang import SGLangEngine
    from megatron_opd.sglang.loop import Loop
    from megatron_opd.sglang.pool import connect
    from megatron_opd.sglang.wire import Limits
    from megatron_opd.student.architecture import read_limits

    loop = Loop()
    sync = _weight_sync(config, parallel, loop)
    own, context = read_limits(config.student.model)
    limits = Limits(vocab_size=own, context=context)
    pool = connect(config.rollout.servers, limits, name="rollout.servers", on_return=sync.give)
    # A replica that does not push itself may be told of new weights a moment before the servers have them.
    lag = 0 if parallel.is_main or config.rollout.max_staleness == 0 else 1
    partly = config.rollout.partial
    return SGLangEngine(pool, loop, sync, eos_ids=eos_ids, vocab_size=vocab_size, partial=partly, lag=lag)


def _weight_sync(config: Config, parallel: Parallel, loop: Loop) -> WeightSync:
    """One replica pushes the weights: all of them sample from the same servers."""
    from megatron_opd.sglang.follow import Follow
    from megatron_opd.sglang.weights.sync import WeightSync
    from megatron_opd.student import hf_dir

    if not parallel.is_main:
        return Follow()
    model = config.student.model
    write = partial(hf_dir.write, like=model)
    return WeightSync(config.rollout, loop, model=model, write=write, spool=Path(config.run.dir) / "weights")
