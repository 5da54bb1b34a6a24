"""A vocabulary seen as a few listed ids and one more outcome, the rest: what top-k teachers can be compared on.

A distribution over V entries becomes one over U + 1 outcomes: U listed ids, and all others together with their exact
mass. By the data-processing inequality a divergence between two distributions seen like this is never larger than
between the distributions themselves, and it is equal when all entries are listed. Several teachers are seen on the
union of their ids; what one of them did not list is in its rest.

Log-probabilities over outcomes are [T, O], O = U + 1, rest last; an outcome that does not exist at a token (a
duplicate, a filler, the rest when all are listed) has PADDING_LOGP, as padding columns have.
Shape suffixes: T tokens, L local vocabulary columns, K ids of one teacher, U ids of the union, O = U + 1 outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_opd.core.vocab import PADDING_LOGP, VocabShard

REST_FLOOR = 1e-6
"""Smallest mass of a rest that is known only as 1 - (listed mass). Listed log-probabilities are fp32 and carry the
rounding of a log-normaliser, about 1e-6 at logits near 30; what is left below that is noise, possibly negative."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The listed ids of each token, ascending; `vocab.size` stands where there is none."""

    ids_TU: torch.Tensor
    vocab: VocabShard

    @classmethod
    def union(cls, lists: Sequence[tuple[torch.Tensor, torch.Tensor]], vocab: VocabShard) -> Outcomes:
        """The union of teachers' ids [T, K_n], each where it was asked, bool [T]. Ids outside the vocabulary are left
        out."""
        valid = [
            ids_TK.masked_fill(~asked_T[:, None] | (ids_TK < 0) | (ids_TK >= vocab.size), vocab.size)
            for ids_TK, asked_T in lists
        ]
        ids_TU = torch.cat(valid, dim=-1).sort(dim=-1).values
        again_TU = torch.zeros_like(ids_TU, dtype=torch.bool)
        again_TU[:, 1:] = ids_TU[:, 1:] == ids_TU[:, :-1]
        return cls(ids_TU.masked_fill(again_TU, vocab.size).sort(dim=-1).values, vocab)

    @property
    def space(self) -> VocabShard:
        """The outcomes as an unsharded vocabulary, for the losses."""
        return VocabShard.whole(self.ids_TU.shape[-1] + 1)

    def exist(self) -> torch.Tensor:
        """Mask of the outcomes that exist at each token, bool [T, O]."""
        listed_TU = self.ids_TU < self.vocab.size
        return torch.cat([listed_TU, listed_TU.sum(-1, keepdim=True) < self.vocab.size], dim=-1)

    def likeliest(self, logp_TO: torch.Tensor) -> torch.Tensor:
        """The listed id of the largest log-probability of each row, [T, O] -> [T]; the rest is no id."""
        return self.ids_TU.gather(-1, logp_TO[:, :-1].argmax(-1, keepdim=True))[:, 0]

    def of_exact(self, logp_TL: torch.Tensor) -> torch.Tensor:
        """A distribution over this shard's columns, [T, L] -> [T, O]; exact, also in the rest, and differentiable."""
        listed_TU = self.vocab.gather(logp_TL, self.ids_TU)
        rest_T = self.vocab.log_rest(logp_TL, self.ids_TU)
        return torch.cat([listed_TU, rest_T[:, None]], dim=-1).masked_fill(~self.exist(), PADDING_LOGP)

    def of_list(self, ids_TK: torch.Tensor, logp_TK: torch.Tensor) -> torch.Tensor:
        """A teacher's list [T, K] -> [T, O]: PADDING_LOGP for what it did not list, the rest from REST_FLOOR up."""
        sorted_TK, order_TK = ids_TK.sort(dim=-1, stable=True)
        at_TU = torch.searchsorted(sorted_TK, self.ids_TU).clamp_max(ids_TK.shape[-1] - 1)
        has_TU = (sorted_TK.gather(-1, at_TU) == self.ids_TU) & (self.ids_TU < self.vocab.size)
        listed_TU = logp_TK.gather(-1, order_TK.gather(-1, at_TU)).clamp_min(PADDING_LOGP)
        listed_TU = listed_TU.masked_fill(~has_TU, PADDING_LOGP)
        rest_T = (1 - listed_TU.double().exp().sum(-1)).clamp_min(REST_FLOOR).log().to(logp_TK.dtype)
        return torch.cat([listed_TU, rest_T[:, None]], dim=-1)

    def normalised(self, logp_TO: torch.Tensor) -> torch.Tensor:
        """A distribution over the outcomes that exist, scaled to sum to 1 (floors add up to 1e-6)."""
        return self.space.log_softmax(logp_TO.masked_fill(~self.exist(), PADDING_LOGP))


def merged(logp_TO: torch.Tensor, like_TO: torch.Tensor) -> torch.Tensor:
    """`logp_TO` with the outcomes that another distribution did not list moved into the rest."""
    kept_TU = like_TO[:, :-1] > PADDING_LOGP
    listed_TU, rest_T1 = logp_TO[:, :-1], logp_TO[:, -1:]
    moved_TO = torch.cat([listed_TU.masked_fill(kept_TU, PADDING_LOGP), rest_T1], dim=-1)
    rest_T1 = moved_TO.logsumexp(-1, keepdim=True)
    return torch.cat([listed_TU.masked_fill(~kept_TU, PADDING_LOGP), rest_T1], dim=-1)
