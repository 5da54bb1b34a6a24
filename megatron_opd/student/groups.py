"""Starts torch.distributed and Megatron's process groups. The only place that asks megatron's parallel_state."""

from __future__ import annotations

import datetime
import os
import warnings

import torch
import torch.distributed as dist

from megatron_opd.config import ParallelConfig, RunConfig
from megatron_opd.core import headroom, rendezvous
from megatron_opd.core.parallel import Parallel
from megatron_opd.student import cpu, deterministic


def start(config: ParallelConfig, run: RunConfig, *, stay_here: bool = True) -> Parallel:
    """Join the process group described by the environment (our launcher, torchrun or srun) and build the grid.

    `stay_here`: ranks that are all on this machine listen on loopback only, see `rendezvous.join`.

    Ranks are ordered tensor-fastest, then context, data and pipeline (Megatron's default), so a tensor-parallel group
    stays within a node. Raises ValueError when the number of ranks is not the layout's.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    _quiet()
    cpu.keep_freed_memory()
    if run.deterministic:
        deterministic.enable()
    check_world_size(config)
    headroom.check()
    timeout = datetime.timedelta(seconds=run.timeout_s)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    rendezvous.join("nccl" if torch.cuda.is_available() else "gloo", timeout, stay_here=stay_here)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=timeout / datetime.timedelta(minutes=1),  # Megatron makes a timedelta of it
    )
    _wait_no_longer_than(timeout)
    model_parallel_cuda_manual_seed(run.seed)
    return _describe(config, timeout)


def _wait_no_longer_than(timeout: datetime.timedelta) -> None:
    """Set the time-out of every group that this rank is in: Megatron gives some of its own none, which is 30 minutes
    then."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def check_world_size(config: ParallelConfig) -> None:
    """Raises ValueError when the number of ranks that were started is not the layout's."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != config.world_size:
        raise ValueError(
            f"{world_size} ranks were started, but parallel.tensor x parallel.pipeline x parallel.context x"
            f" parallel.data = {config.tensor} x {config.pipeline} x {config.context} x {config.data}"
            f" = {config.world_size}"
        )


def _quiet() -> None:
    """Hide warnings about Megatron's own code that a user can do nothing about."""
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.[\w.]+` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"Please use DTensor instead", category=FutureWarning)


def _describe(config: ParallelConfig, timeout: datetime.timedelta) -> Parallel:
    from megatron.core import parallel_state as ps

    everyone = list(range(dist.get_world_size()))
    data_rank = ps.get_data_parallel_rank()
    replicas: list[int] = [0] * len(everyone)
    dist.all_gather_object(replicas, data_rank)
    # Every rank must create every group, in the same order.
    groups = [
        dist.new_group([r for r in everyone if replicas[r] == replica], backend="gloo", timeout=timeout)
        for replica in range(config.data)
    ]
    return Parallel(
        rank=dist.get_rank(),
        world_size=len(everyone),
        tensor_rank=ps.get_tensor_model_parallel_rank(),
        tensor_size=config.tensor,
        pipeline_rank=ps.get_pipeline_model_parallel_rank(),
        pipeline_size=config.pipeline,
        context_rank=ps.get_context_parallel_rank(),
        context_size=config.context,
        data_rank=data_rank,
        data_size=config.data,
        expert_rank=ps.get_expert_model_parallel_rank(),
        expert_size=config.expert,
        sequence=config.sequence,
        length_multiple=config.length_multiple,
        tensor_group=ps.get_tensor_model_parallel_group(),
        pipeline_group=ps.get_pipeline_model_parallel_group(),
        context_group=ps.get_context_parallel_group(),
        data_group=ps.get_data_parallel_group(),
        reduction_group=ps.get_data_parallel_group(with_context_parallel=True),
        expert_group=ps.get_expert_model_parallel_group(),
        replica_group=groups[data_rank],
        world_group=dist.new_group(everyone, backend="gloo", timeout=timeout),
    )


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
