"""A context-parallel rank's part of a micro-batch, and back from the parts to the whole.

A sequence is cut into 2c equal chunks for c ranks; rank r has chunks r and 2c - 1 - r. So ranks have equally many
tokens and, under a causal mask, equally many pairs of query and key: the balanced split of Megatron-core's and
Transformer Engine's context parallelism, whose rotary embeddings and attention expect it. Everybody but the model sees
whole micro-batches; the loss is a sum over tokens, so each rank has its own tokens' part of it.

Shape suffixes: T learnt tokens of a micro-batch, P those of this rank's part, X whatever one has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_opd.core.batching import select
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.types import MicroBatch


@dataclass(frozen=True, slots=True)
class Split:
    """How sequences are split over the `size` ranks of `group`, of which this is rank `rank`."""

    rank: int
    size: int
    group: dist.ProcessGroup

    @property
    def chunks(self) -> tuple[int, int]:
        """Numbers of this rank's chunks, in order."""
        return self.rank, 2 * self.size - 1 - self.rank

    def positions(self, length: int) -> torch.Tensor:
        """Those of sequences of `length` that this rank has, in order, on the CPU."""
        assert length % (2 * self.size) == 0, f"a length of {length} has no {2 * self.size} equal chunks"
        by_chunk = torch.arange(length).view(2 * self.size, -1)
        return by_chunk[list(self.chunks)].flatten()

    def has(self, batch: MicroBatch) -> torch.Tensor:
        """Which learnt tokens are predicted in this rank's part, bool [T]."""
        return torch.isin(self._chunk(batch), torch.tensor(self.chunks, device=batch.predicted_at_T.device))

    def part(self, batch: MicroBatch) -> MicroBatch:
        """This rank's part: its `tokens_BS` and `row_length` are as long as it is, its `predicted_at_T` count in it. It
        may have no learnt token at all."""
        length = batch.tokens_BS.shape[1]
        width = length // (2 * self.size)
        mine = select(batch, self.has(batch))
        second_P = (self._chunk(mine) == self.chunks[1]).long()
        here_P = mine.sequence_T * 2 * width + second_P * width + mine.predicted_at_T % width
        tokens_BS = batch.tokens_BS[:, self.positions(length).to(here_P.device)]
        return replace(mine, tokens_BS=tokens_BS, row_length=2 * width, predicted_at_T=here_P)

    def whole(self, mine_PX: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """What each rank has of its part's learnt tokens -> of all learnt tokens of the whole micro-batch, [T, X],
        on every rank. Collective."""
        whole_TX = mine_PX.new_zeros(len(batch.predicted_at_T), *mine_PX.shape[1:])
        whole_TX[self.has(batch)] = mine_PX
        dist.all_reduce(whole_TX, group=self.group)  # every row is one rank's, the others add 0
        return whole_TX

    def _chunk(self, batch: MicroBatch) -> torch.Tensor:
        """The number of the chunk that each learnt token of a whole micro-batch is predicted in, [T]."""
        length = batch.tokens_BS.shape[1]
        return batch.predicted_at_T % length // (length // (2 * self.size))


def split_of(parallel: Parallel) -> Split | None:
    """None where every rank has whole sequences."""
    if parallel.context_size == 1:
        return None
    return Split(parallel.context_rank, parallel.context_size, parallel.context_group)


def in_order(parts: torch.Tensor, size: int) -> torch.Tensor:
    """The parts of sequences, rank after rank along the first dimension [S, ...] -> whole sequences."""
    by_rank = parts.view(size, 2, -1, *parts.shape[1:])
    return torch.cat([by_rank[:, 0].flatten(0, 1), by_rank[:, 1].flip(0).flatten(0, 1)])
