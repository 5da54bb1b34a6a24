"""What the trainer expects of a teacher."""

from __future__ import annotations

from typing import Protocol

from megatron_opd.core.protocols import Part
from megatron_opd.core.scores import Head, TeacherScore
from megatron_opd.core.types import Rollout
from megatron_opd.loss.crosstok.distillation_in_bytes import Foreigner
from megatron_opd.teachers.offload import OffloadedWeights


class TeacherScorer(Part, Protocol):
    """Something that tells a teacher's distribution at every response token of a rollout."""

    name: str
    head_LD: Head | None
    """This rank's rows of the output head, where scores are hidden states and the loss is computed here; else None."""
    offloaded: OffloadedWeights | None
    """Weights that must be fetched before `score`; None: they are there already, or on servers."""
    foreigner: Foreigner | None
    """The tables that compare a tokenizer of its own with the student's, where the loss is computed here; None: it has
    the student's tokenizer."""

    def submit(self, rollout: Rollout) -> None:
        """Start scoring a rollout that `score` will be asked about; on leaders, from any thread. May do nothing."""

    def score(self, rollouts: list[Rollout]) -> list[TeacherScore | None]:
        """One score a rollout, in order; None where the teacher could not answer and need not. Collective over the
        ranks of a replica."""
