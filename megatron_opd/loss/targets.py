"""From the teachers' scores at a chunk of tokens to the one target that the student is compared with.

    EXACT   every teacher with weight is exact: an average of logits or of probabilities over the vocabulary
    LISTED  a top-k teacher has weight: an average of probabilities over the union of listed ids and the rest
    SAMPLED a sampled-token teacher has weight: an average of probabilities of the sampled token

An average of logits needs every teacher's normaliser, so `config/checks.py` allows it among exact teachers only.
Shape suffixes: C tokens of a chunk, L local vocabulary columns, O outcomes, N teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_opd.config import LossConfig
from megatron_opd.core.scores import Head, Level, TokenRows
from megatron_opd.core.types import MicroBatch
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss import ensemble, told
from megatron_opd.loss.listed_ids import Outcomes
from megatron_opd.loss.told import OnlySampled, StudentLogps, Told


@dataclass(frozen=True, slots=True)
class Target:
    """The combined teachers at the tokens of a chunk, and each one of them."""

    told: list[Told | None]
    """By teacher; None for one without weight at all of these tokens."""
    sampled_C: torch.Tensor
    """The combined log-probabilities of the sampled tokens."""
    logp: torch.Tensor | None
    """The combined log-probabilities, [C, L] or [C, O]; None at the level SAMPLED."""
    outcomes: Outcomes | None
    """The ids that top-k teachers listed; None without such a teacher."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Makes them, on this rank's shard of the vocabulary. `heads` are the teachers' rows of it: [L, D_n], or None for
    a teacher that does not tell hidden states."""

    config: LossConfig
    vocab: VocabShard
    heads: tuple[Head | None, ...]

    @torch.no_grad()
    def at(self, batch: MicroBatch, rows: TokenRows, level: Level) -> Target:
        """The target at tokens that are all of one level."""
        ids_C, weights_CN = batch.targets_T[rows], batch.weights_TN[rows]
        outcomes = None if level is Level.EXACT else self._outcomes(batch, rows)
        told = [
            None if score is None else score.read(rows, _Told(self.config, self.vocab, head, ids_C, outcomes))
            for score, head in zip(batch.teachers, self.heads, strict=True)
        ]
        if level is Level.EXACT:
            target_CL = self._average(told, weights_CN)
            return Target(told, self.vocab.gather(target_CL, ids_C[:, None])[:, 0], target_CL, None)
        sampled = [None if t is None else t.sampled_C[:, None] for t in told]
        sampled_C = ensemble.mean_probs(*_known(sampled, weights_CN))[:, 0]
        if level is Level.SAMPLED:
            return Target(told, sampled_C, None, outcomes)
        assert outcomes is not None
        over = [None if t is None else t.over(outcomes) for t in told]
        target_CO = outcomes.normalised(ensemble.mean_probs(*_known(over, weights_CN)))
        return Target(told, sampled_C, target_CO, outcomes)

    def student(self, logp_CL: torch.Tensor, ids_C: torch.Tensor, target: Target) -> StudentLogps:
        """The student's log-probabilities in the forms that the target can be compared with, with their gradients."""
        logp_CO = None if target.outcomes is None else target.outcomes.of_exact(logp_CL)
        return StudentLogps(logp_CL, self.vocab.gather(logp_CL, ids_C[:, None])[:, 0], logp_CO)

    def _outcomes(self, batch: MicroBatch, rows: TokenRows) -> Outcomes | None:
        asked_CN = batch.weights_TN[rows] > 0
        ids = [None if score is None else score.read(rows, _Ids()) for score in batch.teachers]
        lists = [(ids_CK, asked_CN[:, n]) for n, ids_CK in enumerate(ids) if ids_CK is not None]
        return Outcomes.union(lists, self.vocab) if lists else None

    def _average(self, told: list[Told | None], weights_CN: torch.Tensor) -> torch.Tensor:
        """The average of exact teachers, [C, L]; others have no weight at the level EXACT."""
        if self.config.ensemble == "probs":
            return ensemble.mean_probs(*_known([t and t.logp_CL for t in told], weights_CN))
        return ensemble.mean_logits(*_known([t and t.logits_CL for t in told], weights_CN), self.vocab)


class _Ids:
    """The ids that a score lists for each token of a chunk; None where it lists none."""

    def exact(self, hidden_CD: torch.Tensor) -> None:
        """None."""

    def listed(self, ids_CK: torch.Tensor, logp_CK: torch.Tensor) -> torch.Tensor | None:
        """The ids."""
        return ids_CK

    def sampled(self, logp_C: torch.Tensor) -> None:
        """None."""


@dataclass(frozen=True, slots=True)
class _Told:
    """Reads a score at a chunk of tokens; None where it has no use at their level."""

    config: LossConfig
    vocab: VocabShard
    head_LD: Head | None
    ids_C: torch.Tensor
    outcomes: Outcomes | None

    def exact(self, hidden_CD: torch.Tensor) -> Told | None:
        """The whole distribution, by the teacher's head."""
        assert self.head_LD is not None, "a teacher tells hidden states, but its output head is not here"
        head_LD, hidden_CD = self.head_LD, hidden_CD.to(self.head_LD.dtype)
        z_CL = hidden_CD @ head_LD.T if isinstance(head_LD, torch.Tensor) else head_LD.logits(hidden_CD)
        return told.exact(z_CL.float() / self.config.temperature, self.ids_C, self.vocab)

    def listed(self, ids_CK: torch.Tensor, logp_CK: torch.Tensor) -> Told | None:
        """The ids and the rest; nothing where no list has weight."""
        return None if self.outcomes is None else told.listed(ids_CK, logp_CK, self.ids_C, self.outcomes)

    def sampled(self, logp_C: torch.Tensor) -> Told | None:
        """The sampled tokens."""
        return OnlySampled(logp_C)


def _known(
    by_teacher: Sequence[torch.Tensor | None], weights_CN: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The tensors that there are, and the columns of weights that belong to them."""
    here = [n for n, x in enumerate(by_teacher) if x is not None]
    return [x for x in by_teacher if x is not None], weights_CN[:, here]
