"""A slice of the vocabulary and the few operations whose gradients must know about the other slices.

Under tensor parallelism every rank holds columns [start, stop) of the logits. `VocabShard` offers log-softmax, sum,
gather and the mass of the rest over the *whole* vocabulary with exact gradients; every loss and ensemble is then the
textbook line, whether the vocabulary is sharded or not. A plain in-place all-reduce inside an autograd graph gives
right values and wrong gradients, so the only collectives inside a graph are the two autograd functions below.

Shape suffixes: T tokens, V vocabulary, L local columns of it, K ids. This module refuses nothing and owns no process
group: the group is a value of the shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

PADDING_LOGP = -1e4
"""Log-probability of padding columns. Finite, so that exp() is exactly 0 while floor - floor is 0: with -inf the
backward pass of reverse KL meets 0 * inf."""


class _SumOverShards(torch.autograd.Function):
    """All-reduce forward; identity backward, because the (replicated) result has one (replicated) gradient."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = local.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _WholeColumns(torch.autograd.Function):
    """All columns on every shard forward; backward this shard's part of the (replicated) gradient."""

    @staticmethod
    def forward(ctx: Any, local_TL: torch.Tensor, vocab: VocabShard) -> torch.Tensor:
        ctx.vocab = vocab
        shards = [torch.empty_like(local_TL) for _ in range(dist.get_world_size(vocab.group))]
        dist.all_gather(shards, local_TL.contiguous(), group=vocab.group)
        return torch.cat(shards, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad_TV: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_TV[..., ctx.vocab.start : ctx.vocab.stop], None


class _LogSoftmax(torch.autograd.Function):
    """log p_j = z_j - log sum_k exp z_k over all shards.

    Backward: dL/dz_j = g_j - p_j * sum_k g_k, where k runs over the whole vocabulary: one all-reduce of [T, 1].
    """

    @staticmethod
    def forward(ctx: Any, logits_TL: torch.Tensor, vocab: VocabShard) -> torch.Tensor:
        logits_TL = vocab.fill_padding(logits_TL, float("-inf"))
        max_T1 = vocab.all_reduce(logits_TL.amax(-1, keepdim=True), dist.ReduceOp.MAX)
        # A shard that is padding only still sees the true maximum here, so exp(-inf - max) is a clean 0.
        sum_T1 = vocab.all_reduce((logits_TL - max_T1).exp().sum(-1, keepdim=True))
        logp_TL = vocab.fill_padding(logits_TL - max_T1 - sum_T1.log(), PADDING_LOGP)
        ctx.save_for_backward(logp_TL)
        ctx.vocab = vocab
        return logp_TL

    @staticmethod
    def backward(ctx: Any, grad_TL: torch.Tensor) -> tuple[torch.Tensor, None]:
        (logp_TL,) = ctx.saved_tensors
        grad_TL = ctx.vocab.fill_padding(grad_TL, 0.0)
        total_T1 = ctx.vocab.all_reduce(grad_TL.sum(-1, keepdim=True))
        return grad_TL - logp_TL.exp() * total_T1, None


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Columns [start, stop) of a vocabulary of `size` real entries; columns at or beyond `size` are padding.

    `group` holds the ranks that share the vocabulary; None means that the whole of it is here.
    """

    start: int
    stop: int
    size: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def whole(cls, size: int) -> VocabShard:
        """An unsharded vocabulary without padding."""
        return cls(0, size, size)

    def all_reduce(self, x: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """Reduce `x` in place over the shards, outside autograd, and return it."""
        if self.group is not None:
            dist.all_reduce(x, op, group=self.group)
        return x

    def fill_padding(self, x_TL: torch.Tensor, value: float) -> torch.Tensor:
        """`x_TL` with the padding columns set to `value` (a copy, unless there are none)."""
        num_real = min(max(self.size - self.start, 0), self.stop - self.start)
        if num_real == x_TL.shape[-1]:
            return x_TL
        filled = x_TL.clone()
        filled[..., num_real:] = value
        return filled

    def log_softmax(self, logits_TL: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Normalised log-probabilities of logits / temperature in at least float32; padding has PADDING_LOGP."""
        if logits_TL.dtype != torch.float64:
            logits_TL = logits_TL.float()
        return _LogSoftmax.apply(logits_TL / temperature, self)

    def sum(self, x_TL: torch.Tensor) -> torch.Tensor:
        """Sum over the whole vocabulary, [..., L] -> [...]."""
        local = x_TL.sum(-1)
        return local if self.group is None else _SumOverShards.apply(local, self.group)

    def gather(self, x_TL: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        """Values at global token ids, [T, L] and [T, K] -> [T, K]; each id is owned by exactly one shard."""
        local = ids_TK - self.start
        mine = (local >= 0) & (local < x_TL.shape[-1])
        picked = x_TL.gather(-1, local.clamp(0, x_TL.shape[-1] - 1)).masked_fill(~mine, 0.0)
        return picked if self.group is None else _SumOverShards.apply(picked, self.group)

    def whole_columns(self, x_TL: torch.Tensor) -> torch.Tensor:
        """Every real column on every shard, [T, L] -> [T, size], for what has no sharded form, as sorting.

        What follows must be the same on all shards, for then its gradient is.
        """
        whole = x_TL if self.group is None else _WholeColumns.apply(x_TL, self)
        return whole[..., : self.size]

    def log_rest(self, logp_TL: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        """Log of the mass of all columns but `ids_TK`, [T, L] and [T, K] -> [T]; ids beyond the vocabulary are ignored.

        A sum over the columns that remain, not one minus the listed ones: of a mass of 1e-12 fp32 keeps every digit.
        Where nothing remains it is the log of the smallest normal number, and no gradient flows.
        """
        width = logp_TL.shape[-1]
        local = ids_TK - self.start
        elsewhere = (local < 0) | (local >= width)
        listed_TL = logp_TL.new_zeros(logp_TL.shape[0], width + 1, dtype=torch.bool)
        listed_TL.scatter_(-1, local.masked_fill(elsewhere, width), True)
        mass_T = self.sum(logp_TL.exp().masked_fill(listed_TL[:, :width], 0.0))
        return mass_T.clamp_min(torch.finfo(mass_T.dtype).tiny).log()

    def likeliest(self, x_TL: torch.Tensor) -> torch.Tensor:
        """The id of the largest value of each row over the whole vocabulary, [T, L] -> [T] int64; no gradient."""
        value_T, at_T = self.fill_padding(x_TL.detach(), float("-inf")).max(-1)
        if self.group is None:
            return at_T + self.start
        best_T = self.all_reduce(value_T.clone(), dist.ReduceOp.MAX)
        ids_T = torch.where(value_T == best_T, at_T + self.start, self.size)  # of equal ones the first shard's
        return self.all_reduce(ids_T, dist.ReduceOp.MIN)

    def top(self, x_TL: torch.Tensor, k: int) -> torch.Tensor:
        """The k largest values of the whole vocabulary, descending, [T, L] -> [T, k]; fewer if there are fewer columns.

        Without a gradient. Each shard sends its own k, so k numbers a token and shard travel.
        """
        mine_TK = x_TL.detach().topk(min(k, x_TL.shape[-1]), dim=-1).values
        if self.group is None:
            return mine_TK
        all_TK = self._of_all_shards(mine_TK)
        return all_TK.topk(min(k, all_TK.shape[-1]), dim=-1).values

    def candidates(self, x_TL: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, values) of the k largest values of the whole vocabulary, descending, [T, L] -> int64 [T, k] and [T, k];
        fewer if there are fewer columns. Where there are fewer real entries than k, some ids are `size` or more.

        Without a gradient. Each shard sends its own k.
        """
        values_TK, ids_TK = self.fill_padding(x_TL.detach(), float("-inf")).topk(min(k, x_TL.shape[-1]), dim=-1)
        ids_TK = ids_TK + self.start
        if self.group is not None:
            values_TK, ids_TK = self._of_all_shards(values_TK), self._of_all_shards(ids_TK)
            values_TK, at_TK = values_TK.topk(min(k, values_TK.shape[-1]), dim=-1)
            ids_TK = ids_TK.gather(-1, at_TK)
        return ids_TK, values_TK

    def _of_all_shards(self, mine_TK: torch.Tensor) -> torch.Tensor:
        """Every shard's columns, one shard's behind the other's."""
        everyone = [torch.empty_like(mine_TK) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(everyone, mine_TK.contiguous(), group=self.group)
        return torch.cat(everyone, dim=-1)
