"""The tokens that two vocabularies have in common: same bytes, not same spelling (`▁the` and `Ġthe` are one)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_opd.loss.crosstok.pieces import Pieces
from megatron_opd.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Matched:
    """M pairs of ids, and the ids that have no partner."""

    student_M: torch.Tensor
    teacher_M: torch.Tensor
    student_only_A: torch.Tensor
    teacher_only_B: torch.Tensor

    def to(self, device: torch.device) -> Matched:
        return Matched(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def none(self) -> Matched:
        """The same two vocabularies with no token in common."""
        ours, theirs = [self.student_M, self.student_only_A], [self.teacher_M, self.teacher_only_B]
        return Matched(ours[0][:0], theirs[0][:0], torch.cat(ours), torch.cat(theirs))


def match(student: tuple[Tokenizer, Pieces], teacher: tuple[Tokenizer, Pieces], sizes: tuple[int, int]) -> Matched:
    """By bytes; the models' own ends of a response match. `sizes`: entries of the two models' vocabularies."""
    (ours, our_pieces), (theirs, their_pieces) = student, teacher
    known = their_pieces.ids()
    pairs = [(i, known[piece]) for piece, i in our_pieces.ids().items() if piece in known]
    pairs.append((ours.eos_id, theirs.eos_id))
    pairs = sorted((i, j) for i, j in pairs if i < sizes[0] and j < sizes[1])
    student_M, teacher_M = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return Matched(student_M, teacher_M, _others(student_M, sizes[0]), _others(teacher_M, sizes[1]))


def _others(ids_M: torch.Tensor, size: int) -> torch.Tensor:
    is_other = torch.ones(size, dtype=torch.bool)
    is_other[ids_M] = False
    return is_other.nonzero()[:, 0]
