"""A teacher's scores of tokens, a class for each carrier (`teachers.N.carrier`).

A class owns everything that depends on the form: how rollouts' scores become one micro-batch's, what is left of some
tokens, what the loss can read from it, and which numbers to look at when a loss is not finite. A further carrier is a
class here and a line in `CARRIERS`, its name in `config/models.py`, and the scorer that makes it.

Shapes: R learnt tokens of one rollout, T learnt tokens of a micro-batch, C some of them, D teacher hidden size, K ids
that a teacher lists for a token, Q tokens of a teacher with another tokenizer, G spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch

_T = TypeVar("_T", covariant=True)
TokenRows: TypeAlias = slice | torch.Tensor
"""Some tokens: a range, their indices, or a mask."""


class OwnHead(Protocol):
    """A teacher's output head that makes its product itself, because that is not the plain one of two tensors.

    Shape letters: C tokens, L rows (columns of the logits), D hidden size.
    """

    shape: torch.Size
    """[L, D]."""
    dtype: torch.dtype
    """Type of hidden states and logits."""
    device: torch.device

    def logits(self, hidden_CD: torch.Tensor, out_CL: torch.Tensor | None = None) -> torch.Tensor:
        """h Wᵀ without a gradient, [C, L], where there is an `out_CL` into that."""

    def is_finite(self) -> bool:
        """Whether all of its numbers are."""


Head: TypeAlias = torch.Tensor | OwnHead
"""Rows of an output head, [L, D]."""


class Level(IntEnum):
    """How much of a distribution is known: all of it, some ids and the rest, or the sampled token alone."""

    EXACT = 0
    LISTED = 1
    SAMPLED = 2


class Reader(Protocol[_T]):
    """The loss, as a score tells it about a chunk of tokens; one method for each level."""

    def exact(self, hidden_CD: torch.Tensor) -> _T:
        """Hidden states, which the teacher's head turns into logits."""

    def listed(self, ids_CK: torch.Tensor, logp_CK: torch.Tensor) -> _T:
        """Log-probabilities of some ids at temperature 1, the sampled token always among them."""

    def sampled(self, logp_C: torch.Tensor) -> _T:
        """Log-probabilities of the sampled tokens at temperature 1."""


class TeacherScore(Protocol):
    """A teacher's score of one rollout; in a micro-batch of all its tokens, so R is T there."""

    level: ClassVar[Level]
    is_hidden: ClassVar[bool]
    """Whether it has hidden states for every token, so that the fused loss can work on those."""

    @classmethod
    def joined(
        cls, scores: Sequence[Any], learnt_ids: Sequence[Sequence[int]], device: torch.device
    ) -> TeacherScore | None:
        """Rollouts' scores of this class as one, with fillers where a score is None (one at least is not).
        `learnt_ids` are the rollouts' tokens. None on a rank that does not compute the loss."""

    def at(self, rows: TokenRows) -> TeacherScore | None:
        """The score of some tokens; None where it has no part for single tokens of the student."""

    def hidden(self) -> torch.Tensor | None:
        """Hidden states of all tokens [T, D], where `is_hidden`, on ranks that compute the loss."""

    def read(self, rows: TokenRows, reader: Reader[_T]) -> _T:
        """Tell the loss about a chunk of tokens."""

    def numbers_at(self, t: int) -> torch.Tensor:
        """Everything that was said about token `t`: if one is not finite, the loss is not."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """A teacher's final hidden states for one rollout: row r predicts `learnt_ids[r]`.

    `hidden_RD` is None on ranks that do not compute the loss (all but the last pipeline stage): what is dense stays
    where it is used.
    """

    level: ClassVar[Level] = Level.EXACT
    is_hidden: ClassVar[bool] = True
    hidden_RD: torch.Tensor | None

    @classmethod
    def joined(
        cls, scores: Sequence[Hidden | None], learnt_ids: Sequence[Sequence[int]], device: torch.device
    ) -> Hidden | None:
        """As `TeacherScore.joined`; the rows are on the device already."""
        if any(score is not None and score.hidden_RD is None for score in scores):
            return None
        return cls(*_with_fillers(scores, learnt_ids))

    def at(self, rows: TokenRows) -> Hidden:
        """As `TeacherScore.at`."""
        return Hidden(None if self.hidden_RD is None else self.hidden_RD[rows])

    def hidden(self) -> torch.Tensor | None:
        """As `TeacherScore.hidden`."""
        return self.hidden_RD

    def read(self, rows: TokenRows, reader: Reader[_T]) -> _T:
        """As `TeacherScore.read`."""
        assert self.hidden_RD is not None
        return reader.exact(self.hidden_RD[rows])

    def numbers_at(self, t: int) -> torch.Tensor:
        """As `TeacherScore.numbers_at`."""
        assert self.hidden_RD is not None
        return self.hidden_RD[t]


@dataclass(frozen=True, slots=True)
class TopK:
    """A teacher's K log-probabilities for each token of one rollout, over its full vocabulary at temperature 1.

    Row r holds `learnt_ids[r]` always: where it is not among the K likeliest it stands in place of the K-th. Order is
    free. An id that is listed twice counts once; ids outside the vocabulary are fillers.
    """

    level: ClassVar[Level] = Level.LISTED
    is_hidden: ClassVar[bool] = False
    ids_RK: torch.Tensor
    """int64."""
    logp_RK: torch.Tensor
    """float32, nats."""

    @classmethod
    def joined(cls, scores: Sequence[TopK | None], learnt_ids: Sequence[Sequence[int]], device: torch.device) -> TopK:
        """As `TeacherScore.joined`. Raises ValueError for a list without the sampled token, whose log-probability would
        then be another token's."""
        for score, ids in zip(scores, learnt_ids, strict=True):
            if score is not None and not bool((score.ids_RK == torch.tensor(ids)[:, None]).any(-1).all()):
                raise ValueError("a teacher's list of a token lacks the token that was sampled")
        return cls(*(x.to(device) for x in _with_fillers(scores, learnt_ids)))

    def at(self, rows: TokenRows) -> TopK:
        """As `TeacherScore.at`."""
        return TopK(self.ids_RK[rows], self.logp_RK[rows])

    def hidden(self) -> None:
        """None: there are none."""

    def read(self, rows: TokenRows, reader: Reader[_T]) -> _T:
        """As `TeacherScore.read`."""
        return reader.listed(self.ids_RK[rows], self.logp_RK[rows])

    def numbers_at(self, t: int) -> torch.Tensor:
        """As `TeacherScore.numbers_at`."""
        return self.logp_RK[t]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A teacher's log-probability of each `learnt_ids[r]` of one rollout, at temperature 1."""

    level: ClassVar[Level] = Level.SAMPLED
    is_hidden: ClassVar[bool] = False
    logp_R: torch.Tensor
    """float32, nats."""

    @classmethod
    def joined(
        cls, scores: Sequence[Sampled | None], learnt_ids: Sequence[Sequence[int]], device: torch.device
    ) -> Sampled:
        """As `TeacherScore.joined`."""
        return cls(*(x.to(device) for x in _with_fillers(scores, learnt_ids)))

    def at(self, rows: TokenRows) -> Sampled:
        """As `TeacherScore.at`."""
        return Sampled(self.logp_R[rows])

    def hidden(self) -> None:
        """None: there are none."""

    def read(self, rows: TokenRows, reader: Reader[_T]) -> _T:
        """As `TeacherScore.read`."""
        return reader.sampled(self.logp_R[rows])

    def numbers_at(self, t: int) -> torch.Tensor:
        """As `TeacherScore.numbers_at`."""
        return self.logp_R[t]


@dataclass(frozen=True, slots=True)
class Foreign:
    """A teacher's final hidden states at its own tokens of one rollout's learnt text, and where the two cuts meet."""

    level: ClassVar[Level] = Level.EXACT
    is_hidden: ClassVar[bool] = False
    hidden_QD: torch.Tensor | None
    """Row q predicts `ids_Q[q]`; None on ranks that do not compute the loss."""
    ids_Q: torch.Tensor
    """int64, of the teacher's vocabulary."""
    spans_G4: torch.Tensor
    """int64; student tokens [first, stop), counted among the learnt ones, and rows [first, stop) of `hidden_QD` of the
    same bytes."""

    @classmethod
    def joined(
        cls, scores: Sequence[Foreign | None], learnt_ids: Sequence[Sequence[int]], device: torch.device
    ) -> Foreign | None:
        """As `TeacherScore.joined`: the teacher's own tokens concatenated, and the spans counted along with them."""
        hidden, ids, spans, at, their_at = [], [], [], 0, 0
        for score, learnt in zip(scores, learnt_ids, strict=True):
            if score is not None:
                if score.hidden_QD is None:
                    return None
                hidden.append(score.hidden_QD)
                ids.append(score.ids_Q)
                spans.append(score.spans_G4 + torch.tensor([at, at, their_at, their_at]))
                their_at += len(score.ids_Q)
            at += len(learnt)
        return cls(torch.cat(hidden), torch.cat(ids).to(device), torch.cat(spans).to(device))

    def at(self, rows: TokenRows) -> None:
        """None: its rows are no tokens of the student."""

    def hidden(self) -> None:
        """None: they are not those of the student's tokens."""

    def read(self, rows: TokenRows, reader: Reader[_T]) -> _T:
        """Not by token: `loss/crosstok` compares spans."""
        raise TypeError("a teacher with a tokenizer of its own is compared by spans")

    def numbers_at(self, t: int) -> torch.Tensor:
        """About the span that ends with the token, if one does."""
        assert self.hidden_QD is not None
        spans = self.spans_G4.tolist()
        return self.hidden_QD[[q for _, end, first, stop in spans if end == t + 1 for q in range(first, stop)]]


CARRIERS: dict[str, type[TeacherScore]] = {"hidden": Hidden, "topk": TopK, "sampled": Sampled}
"""By the name in the settings. A teacher with its own tokenizer has the carrier hidden; its scores are `Foreign`."""


def joined(
    scores: Sequence[TeacherScore | None], learnt_ids: Sequence[Sequence[int]], device: torch.device
) -> TeacherScore | None:
    """A teacher's scores of rollouts as one about all their learnt tokens. None where it says nothing about any of
    them, or on a rank that does not compute the loss."""
    known = next((score for score in scores if score is not None), None)
    return None if known is None else type(known).joined(scores, learnt_ids, device)


def _with_fillers(scores: Sequence[TeacherScore | None], learnt_ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Each of the scores' tensors concatenated, with zeros for rollouts without a score."""
    known = next(score for score in scores if score is not None)
    made = []
    for field in fields(known):  # type: ignore[arg-type]
        like = getattr(known, field.name)
        made.append(
            torch.cat(
                [
                    like.new_zeros(len(ids), *like.shape[1:]) if score is None else getattr(score, field.name)
                    for score, ids in zip(scores, learnt_ids, strict=True)
                ]
            )
        )
    return made
