"""One pass over rows of logits on a shard: statistics, exchange, sums, exchange, gradient.

The three steps are separate, so that other work (the next chunk's matrix products) can lie between an exchange and its
use. Where the vocabulary is not sharded, the first step does all of it in one look at each row.

Shape suffixes: R rows, L local columns, N teachers, K statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.fused import exchange
from megatron_opd.loss.fused.statistics import LogitRows, LossSpec, centers
from megatron_opd.loss.fused.token_results import SampledLogits, TokenResults, outcome


@dataclass(frozen=True, slots=True)
class Known:
    """Statistics and sums of rows over all shards: enough for their gradient."""

    stats_RK: torch.Tensor
    sums_R3: torch.Tensor | None
    sampled_RM: torch.Tensor


@dataclass(frozen=True, slots=True)
class PassInputs:
    """The inputs of a pass."""

    rows: LogitRows
    asked: LossSpec
    vocab: VocabShard
    scale_R: torch.Tensor | None
    """float64 factor of each row's gradient; None without gradients."""
    ids_R: torch.Tensor | None
    """Sampled tokens, for metrics about them."""
    known: Known | None = None
    """Findings of an earlier pass over the same rows; then only the gradient is made."""


class Kernels(Protocol):
    """The arithmetic of rows; `reference.py` has the formulas, and says what each method does."""

    def whole(
        self, rows: LogitRows, asked: LossSpec, scale_R: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...

    def stats(self, rows: LogitRows, asked: LossSpec) -> torch.Tensor: ...

    def sums(self, rows: LogitRows, asked: LossSpec, stats_RK: torch.Tensor) -> torch.Tensor: ...

    def gradient(
        self, rows: LogitRows, asked: LossSpec, stats_RK: torch.Tensor, center_scale: tuple[torch.Tensor, torch.Tensor]
    ) -> None: ...


class Pass:
    """`start`, `middle`, `finish`, in this order, on every shard alike."""

    def __init__(self, inputs: PassInputs, kernels: Kernels) -> None:
        self.rows, self.asked, self.vocab, self.backend = inputs.rows, inputs.asked, inputs.vocab, kernels
        self.scale_R, self.ids_R = inputs.scale_R, inputs.ids_R
        self._known = inputs.known
        self._is_known = inputs.known is not None
        self._gathered: exchange.Pending | None = None
        self._sums: exchange.Pending | None = None

    def start(self) -> None:
        """Look at the rows; send what the other shards need."""
        if self._is_known:
            return
        sampled_RM = self._sampled_logits()
        if self.vocab.group is None:
            self._known = Known(*self.backend.whole(self.rows, self.asked, self.scale_R), sampled_RM)
            return
        stats_RK = self.backend.stats(self.rows, self.asked)
        self._gathered = exchange.gather(torch.cat([sampled_RM, stats_RK], dim=-1), self.vocab.group)

    def middle(self) -> None:
        """Learn the normalisers; where sums need them, make and send those. Once, however often it is called."""
        if self._gathered is None:
            return
        everyone_WRK, self._gathered = self._gathered.wait(), None
        num_sampled = everyone_WRK.shape[-1] - self.asked.num_stats
        stats_RK = exchange.merged(everyone_WRK[..., num_sampled:], self.asked).contiguous()
        if self.asked.has_sums:
            assert self.vocab.group is not None
            self._sums = exchange.add(self.backend.sums(self.rows, self.asked, stats_RK), self.vocab.group)
        self._known = Known(stats_RK, None, everyone_WRK[..., :num_sampled].sum(0))

    def finish(self) -> TokenResults:
        """Put the gradient in place of the student's logits, unless `start` did."""
        if self._sums is not None:
            self._known = replace(self.known(), sums_R3=self._sums.wait())
        known = self.known()
        if self.scale_R is not None and (self._is_known or self.vocab.group is not None):
            center_R = centers(known.stats_RK, known.sums_R3)
            self.backend.gradient(self.rows, self.asked, known.stats_RK, (center_R, self.scale_R))
        sampled = None
        if self.ids_R is not None:
            sampled = SampledLogits(known.sampled_RM[:, 0], known.sampled_RM[:, 1:])
        return outcome(self.asked, self.rows.weights_RN, known.stats_RK, known.sums_R3, sampled)

    def known(self) -> Known:
        """The findings; after `middle`."""
        assert self._known is not None
        return self._known

    def _sampled_logits(self) -> torch.Tensor:
        """Logits of the sampled tokens that this shard has, 0 for others: the student's, the teachers'; [R, 1 + N]."""
        if self.ids_R is None:
            return self.rows.student_RL.new_zeros(self.rows.num_rows, 0, dtype=torch.float64)
        local_R = self.ids_R - self.vocab.start
        elsewhere_R = (local_R < 0) | (local_R >= self.rows.width)
        at_R = torch.arange(self.rows.num_rows, device=local_R.device)
        if self.rows.index_R is not None:
            at_R = self.rows.index_R
        local_R = local_R.clamp(0, max(self.rows.width - 1, 0))
        columns = [x[at_R, local_R].double() for x in (self.rows.student_RL, *self.rows.teachers)]
        return torch.stack(columns, dim=-1).masked_fill(elsewhere_R[:, None], 0.0)
