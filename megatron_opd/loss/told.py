"""One teacher's score at some tokens, in any form: hidden states, a list of ids, the sampled token.

Each kind answers the same questions as far as it can, so that the objective asks them of any mixture of teachers.
`Level` says what a token's teachers allow together: the whole vocabulary, the listed ids and the rest, or the sampled
token alone. A micro-batch is cut into chunks of one level.

Shape suffixes: T tokens of a micro-batch, C tokens of a chunk, L local vocabulary columns, K listed ids, O outcomes
(`listed_ids.py`), N teachers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_opd.core.scores import Level, TokenRows
from megatron_opd.core.types import MicroBatch
from megatron_opd.core.vocab import PADDING_LOGP, VocabShard
from megatron_opd.loss import reverse_kl
from megatron_opd.loss.listed_ids import Outcomes, merged
from megatron_opd.loss.metrics import Columns


def chunks(batch: MicroBatch, size: int) -> Iterator[tuple[Level, TokenRows]]:
    """All tokens of a micro-batch, `size` or fewer at a time, each time of one level: the least that a teacher with
    weight tells about a token. The same on every shard."""
    levels = [Level.EXACT if score is None else score.level for score in batch.teachers]
    if not any(levels):
        yield from ((Level.EXACT, slice(at, at + size)) for at in range(0, len(batch.targets_T), size))
        return
    asked_TN = batch.weights_TN > 0
    level_T = (asked_TN * torch.tensor(levels, device=asked_TN.device)).amax(-1)
    for level in Level:
        for rows in (level_T == level).nonzero()[:, 0].split(size):
            if len(rows):
                yield level, rows


@dataclass(frozen=True, slots=True)
class StudentLogps:
    """The student at the tokens of a chunk, as teachers are compared with it."""

    logp_CL: torch.Tensor
    sampled_C: torch.Tensor
    """Its log-probabilities of the sampled tokens."""
    logp_CO: torch.Tensor | None
    """The same distribution over the outcomes that top-k teachers listed; None where none was asked."""


class Told(Protocol):
    """A teacher at the tokens of a chunk."""

    sampled_C: torch.Tensor
    """Its log-probabilities of the sampled tokens."""
    logits_CL: torch.Tensor | None
    """Its logits divided by the temperature; None where they are not known."""
    logp_CL: torch.Tensor | None
    """Its log-probabilities of the whole vocabulary; None where they are not known."""

    def over(self, outcomes: Outcomes) -> torch.Tensor | None:
        """Log-probabilities of outcomes, [C, O]; None where they are not known."""

    def reverse_kl(self, student: StudentLogps) -> torch.Tensor:
        """KL(q || p) as far as the teacher is known, [C]."""

    def list_metrics(self, student: StudentLogps, kth_C: torch.Tensor) -> Columns:
        """Figures about the teacher's list of ids, [C] each; nothing where it has none. `kth_C`: the student's own K-th
        largest log-probability, K the length of the list."""


@dataclass(frozen=True, slots=True)
class Exact:
    """A teacher whose whole distribution is known."""

    logits_CL: torch.Tensor
    logp_CL: torch.Tensor
    sampled_C: torch.Tensor
    vocab: VocabShard

    def over(self, outcomes: Outcomes) -> torch.Tensor:
        """Log-probabilities of outcomes, [C, O]."""
        return outcomes.of_exact(self.logp_CL)

    def reverse_kl(self, student: StudentLogps) -> torch.Tensor:
        """KL(q || p), [C]."""
        return reverse_kl(student.logp_CL, self.logp_CL, self.vocab)

    def list_metrics(self, student: StudentLogps, kth_C: torch.Tensor) -> Columns:
        """Nothing: there is no list."""
        return {}


@dataclass(frozen=True, slots=True)
class Listed:
    """A teacher known at its K ids, and at all others together."""

    logp_CO: torch.Tensor
    sampled_C: torch.Tensor
    logits_CL: None = None
    logp_CL: None = None

    def over(self, outcomes: Outcomes) -> torch.Tensor:
        """Log-probabilities of outcomes, [C, O]; what the teacher did not list is in the rest."""
        return self.logp_CO

    def reverse_kl(self, student: StudentLogps) -> torch.Tensor:
        """KL(q || p) over the teacher's own ids and their rest, [C]: a lower bound."""
        assert student.logp_CO is not None
        space = VocabShard.whole(self.logp_CO.shape[-1])
        return reverse_kl(merged(student.logp_CO, self.logp_CO), self.logp_CO, space)

    def list_metrics(self, student: StudentLogps, kth_C: torch.Tensor) -> Columns:
        """The teacher's mass that is not at its ids, and how many of those are the student's likeliest ones too."""
        return {"mass_outside": self.logp_CO[:, -1].exp(), "overlap": self._overlap(student, kth_C)}

    def _overlap(self, student: StudentLogps, kth_C: torch.Tensor) -> torch.Tensor:
        """The fraction of the ids at which the student has at least `kth_C`, its own K-th largest value, [C]."""
        assert student.logp_CO is not None
        listed_CU = self.logp_CO[:, :-1] > PADDING_LOGP
        shared_CU = listed_CU & (student.logp_CO[:, :-1] >= kth_C[:, None])
        return shared_CU.sum(-1) / listed_CU.sum(-1).clamp_min(1)


@dataclass(frozen=True, slots=True)
class OnlySampled:
    """A teacher known at the sampled tokens."""

    sampled_C: torch.Tensor
    logits_CL: None = None
    logp_CL: None = None

    def over(self, outcomes: Outcomes) -> None:
        """None: it is not known at other tokens."""

    def reverse_kl(self, student: StudentLogps) -> torch.Tensor:
        """log q - log p of the sampled tokens, [C]: the k1 estimate of KL(q || p), which may be negative."""
        return student.sampled_C - self.sampled_C

    def list_metrics(self, student: StudentLogps, kth_C: torch.Tensor) -> Columns:
        """Nothing: there is no list."""
        return {}


def exact(logits_CL: torch.Tensor, ids_C: torch.Tensor, vocab: VocabShard) -> Exact:
    """From logits that are divided by the temperature, and the sampled tokens."""
    logp_CL = vocab.log_softmax(logits_CL)
    return Exact(logits_CL, logp_CL, vocab.gather(logp_CL, ids_C[:, None])[:, 0], vocab)


def listed(ids_CK: torch.Tensor, logp_CK: torch.Tensor, ids_C: torch.Tensor, outcomes: Outcomes) -> Listed:
    """From a teacher's list and the sampled tokens, which are in it wherever it was asked."""
    at_C1 = (ids_CK == ids_C[:, None]).int().argmax(-1, keepdim=True)
    return Listed(outcomes.of_list(ids_CK, logp_CK), logp_CK.gather(-1, at_C1)[:, 0])
