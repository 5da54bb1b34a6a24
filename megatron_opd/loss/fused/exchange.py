"""Exchanges between the shards of a vocabulary about their rows: one packed gather, or one sum, and no more.

Statistics are relative to local maxima; `merged` puts the shards' on one scale. Both exchanges are started and waited
for separately, so that other work can lie between; on CUDA, NCCL runs them on a stream of its own.

Shape suffixes: W shards, R rows, K statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_opd.loss.fused.statistics import S_MAX, S_SUM, LossSpec


@dataclass(slots=True)
class Pending:
    """Something under way."""

    value: torch.Tensor
    work: Any

    def wait(self) -> torch.Tensor:
        """The result; further kernels are queued behind it."""
        self.work.wait()
        return self.value


def gather(local_RK: torch.Tensor, group: dist.ProcessGroup) -> Pending:
    """Start to collect every shard's [R, K] as [W, R, K]."""
    everyone_WRK = local_RK.new_empty(dist.get_world_size(group), *local_RK.shape)
    work = dist.all_gather(list(everyone_WRK), local_RK.contiguous(), group=group, async_op=True)
    return Pending(everyone_WRK, work)


def add(local: torch.Tensor, group: dist.ProcessGroup) -> Pending:
    """Start to sum over the shards, in place."""
    return Pending(local, dist.all_reduce(local, group=group, async_op=True))


def merged(everyone_WRK: torch.Tensor, asked: LossSpec) -> torch.Tensor:
    """Statistics of the whole vocabulary [R, K] from those of its shards."""
    out_RK = torch.empty_like(everyone_WRK[0])
    s_max_WR = everyone_WRK[..., S_MAX]
    s_max_R, s_factor_WR = _scale(s_max_WR)
    s_sum_WR = everyone_WRK[..., S_SUM] * s_factor_WR
    out_RK[:, S_MAX], out_RK[:, S_SUM] = s_max_R, s_sum_WR.sum(0)
    for at in asked.targets:
        t_max_R, t_factor_WR = _scale(everyone_WRK[..., at.max])
        t_sum_WR = everyone_WRK[..., at.sum] * t_factor_WR
        out_RK[:, at.max], out_RK[:, at.sum] = t_max_R, t_sum_WR.sum(0)
        # Differences u - v of a shard are relative to its own maxima.
        shift_WR = (s_max_WR - s_max_R) - (everyone_WRK[..., at.max] - t_max_R)
        if at.gap_s is not None:
            gap_s_WR = everyone_WRK[..., at.gap_s] * s_factor_WR
            out_RK[:, at.gap_s] = (gap_s_WR + s_sum_WR * shift_WR).sum(0)
        if at.gap_t is not None:
            out_RK[:, at.gap_t] = (everyone_WRK[..., at.gap_t] * t_factor_WR - t_sum_WR * shift_WR).sum(0)
    if asked.sampler_ratio:
        out_RK[:, -1] = (everyone_WRK[..., -1] * s_factor_WR.pow(asked.sampler_ratio)).sum(0)
    return out_RK


def _scale(max_WR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest maximum, and the factors that put the shards' exponentials on it."""
    max_R = max_WR.amax(0)
    return max_R, (max_WR - max_R).exp()
