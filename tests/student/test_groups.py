"""The process groups of a run: each waits exactly as long as `run.timeout_s` says."""

import datetime
import os

import pytest
import torch
import torch.distributed as dist

from megatron_opd.core import rendezvous


def time_outs(parallel, timeout_s, store, layout):
    """The time-outs of all groups and of the store, in seconds, of a run that is started with that setting."""
    from megatron.core import parallel_state

    from megatron_opd.config import ParallelConfig, RunConfig
    from megatron_opd.student import groups

    parallel_state.destroy_model_parallel()
    groups.stop()
    os.environ[rendezvous.STORE] = store
    try:
        groups.start(ParallelConfig(**layout), RunConfig(dir="unused", timeout_s=timeout_s))
        everyone = dist.distributed_c10d._world.pg_map
        backends = [group._get_backend(torch.device("cpu")) for group in everyone]
        store_s = dist.distributed_c10d._get_default_store().timeout
        return [backend.options._timeout for backend in backends], store_s
    finally:
        del os.environ[rendezvous.STORE]


@pytest.mark.parametrize(
    ("timeout_s", "layout"),
    [
        (7.0, {"tensor": 2}),
        (61.0, {"pipeline": 2}),
        (150.5, {"data": 2}),
        (20.0, {"context": 2}),
        (89.999, {"tensor": 2}),
        (5000.25, {"tensor": 2}),
    ],
)
def test_time_outs_are_the_seconds_that_are_set(ranks, tmp_path, timeout_s, layout):
    for of_groups, of_store in ranks.run(2, time_outs, timeout_s, str(tmp_path / "store"), layout):
        assert len(of_groups) > 10  # ours and Megatron's
        assert set(of_groups) == {of_store} == {datetime.timedelta(seconds=timeout_s)}
