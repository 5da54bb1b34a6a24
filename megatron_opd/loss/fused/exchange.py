"""What shards of a vocabulary tell each other about their rows: one packed gather, or one sum, and no more.

Statistics are relative to local maxima; `merged` puts the shards' on one scale. Both exchanges are started and waited
for separately, so that other work can lie between; on CUDA, NCCL runs them on a stream of its own.

Shape suffixes: W shards, R rows, K statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.fused.statistics import GAP_S, GAP_T, S_MAX, S_SUM, T_MAX, LossSpec


@dataclass(slots=True)
class Pending:
    """Something under way."""

    value: torch.Tensor
    work: Any = None

    def wait(self) -> torch.Tensor:
        """The result; further kernels are queued behind it."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.value


def gather(local_RK: torch.Tensor, vocab: VocabShard) -> Pending:
    """Start to collect every shard's [R, K] as [W, R, K]."""
    if vocab.group is None:
        return Pending(local_RK[None])
    everyone_WRK = local_RK.new_empty(dist.get_world_size(vocab.group), *local_RK.shape)
    work = dist.all_gather(list(everyone_WRK), local_RK.contiguous(), group=vocab.group, async_op=True)
    return Pending(everyone_WRK, work)


def add(local: torch.Tensor, vocab: VocabShard) -> Pending:
    """Start to sum over the shards, in place."""
    if vocab.group is None:
        return Pending(local)
    return Pending(local, dist.all_reduce(local, group=vocab.group, async_op=True))


def merged(everyone_WRK: torch.Tensor, asked: LossSpec) -> torch.Tensor:
    """Statistics of the whole vocabulary [R, K] from those of its shards."""
    if everyone_WRK.shape[0] == 1:
        return everyone_WRK[0]
    out_RK = torch.empty_like(everyone_WRK[0])
    s_max_WR = everyone_WRK[..., S_MAX]
    s_max_R, s_factor_WR = _scale(s_max_WR)
    s_sum_WR = everyone_WRK[..., S_SUM] * s_factor_WR
    out_RK[:, S_MAX], out_RK[:, S_SUM] = s_max_R, s_sum_WR.sum(0)
    for at in [*([T_MAX] if asked.has_target else []), *asked.teachers_at]:
        t_max_R, t_factor_WR = _scale(everyone_WRK[..., at])
        t_sum_WR = everyone_WRK[..., at + 1] * t_factor_WR
        out_RK[:, at], out_RK[:, at + 1] = t_max_R, t_sum_WR.sum(0)
        is_target = asked.has_target and at == T_MAX
        if not is_target and asked.teacher_columns < 3:
            continue
        # Differences u - v of a shard are relative to its own maxima.
        shift_WR = (s_max_WR - s_max_R) - (everyone_WRK[..., at] - t_max_R)
        gap_s_WR = everyone_WRK[..., at + GAP_S - T_MAX] * s_factor_WR
        out_RK[:, at + GAP_S - T_MAX] = (gap_s_WR + s_sum_WR * shift_WR).sum(0)
        if is_target:
            out_RK[:, GAP_T] = (everyone_WRK[..., GAP_T] * t_factor_WR - t_sum_WR * shift_WR).sum(0)
    if asked.sampler_ratio:
        out_RK[:, -1] = (everyone_WRK[..., -1] * s_factor_WR.pow(asked.sampler_ratio)).sum(0)
    return out_RK


def _scale(max_WR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest maximum, and the factors that put the shards' exponentials on it."""
    max_R = max_WR.amax(0)
    return max_R, (max_WR - max_R).exp()
