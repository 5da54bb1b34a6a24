"""A teacher with a tokenizer of its own: the student's answers in its tokens, scored by whatever scores it.

The prompt is the teacher's own (`Prompt.teacher_ids`), what follows it is the student's text. `crosstok/` compares what
comes back with the student.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_opd.core.scores import Foreign, Hidden
from megatron_opd.core.types import Rollout
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.crosstok.align import Span, Translator
from megatron_opd.loss.crosstok.distillation_in_bytes import Foreigner
from megatron_opd.loss.crosstok.matched import Matched
from megatron_opd.teachers.offload import OffloadedWeights
from megatron_opd.teachers.scorer import TeacherScorer


@dataclass(frozen=True, slots=True)
class _Translated:
    rollout: Rollout
    """The same trajectory in the teacher's tokens."""
    spans: tuple[Span, ...]

    @property
    def is_asked(self) -> bool:
        """Whether the teacher has anything to say about it."""
        return self.rollout.num_learnt > 0


class ForeignTeacher:
    """Wraps the scorer of the teacher's own tokens, which tells hidden states."""

    def __init__(self, scorer: TeacherScorer, translator: Translator, *, vocab: VocabShard, matched: Matched) -> None:
        """`vocab` is this rank's shard of the teacher's vocabulary, whose rows `scorer.head_LD` has."""
        self.name, self.head_LD = scorer.name, scorer.head_LD
        self.foreigner: Foreigner | None = None
        if self.head_LD is not None:
            self.foreigner = Foreigner(self.head_LD, vocab, matched.to(self.head_LD.device))
        self._scorer, self._translator = scorer, translator
        self._submitted: dict[Rollout, _Translated] = {}

    @property
    def offloaded(self) -> OffloadedWeights | None:
        """The scorer's."""
        return self._scorer.offloaded

    def submit(self, rollout: Rollout) -> None:
        """Start scoring a rollout."""
        theirs = self._submitted[rollout] = self._translated(rollout)
        if theirs.is_asked:
            self._scorer.submit(theirs.rollout)

    def score(self, rollouts: list[Rollout]) -> list[Foreign | None]:
        """One score a rollout, in order; without spans where the teacher's tokenizer cannot say the same text."""
        theirs = [self._submitted.get(rollout) or self._translated(rollout) for rollout in rollouts]
        for rollout in rollouts:  # one may be there twice
            self._submitted.pop(rollout, None)
        answers = iter(self._scorer.score([t.rollout for t in theirs if t.is_asked]))
        return [self._score(t, next(answers) if t.is_asked else None) for t in theirs]

    def metrics(self) -> dict[str, float]:
        """The scorer's."""
        return self._scorer.metrics()

    def close(self) -> None:
        """Ends the scorer."""
        self._scorer.close()

    def _translated(self, rollout: Rollout) -> _Translated:
        said = self._translator.translate(rollout.token_ids, rollout.learnt)
        count = sum(said.learnt)
        unknown = {"logps": (0.0,) * count, "versions": (0,) * count}
        theirs = replace(rollout, token_ids=said.ids, learnt=said.learnt, **unknown)
        return _Translated(theirs, said.spans)

    def _score(self, theirs: _Translated, answer: Hidden | None) -> Foreign | None:
        ids_Q = torch.tensor(theirs.rollout.learnt_ids, dtype=torch.long)
        spans_G4 = torch.tensor(theirs.spans, dtype=torch.long).reshape(-1, 4)
        if len(ids_Q) == 0:
            hidden_QD = None if self.head_LD is None else self.head_LD.new_zeros(0, self.head_LD.shape[1])
            return Foreign(hidden_QD, ids_Q, spans_G4)
        return None if answer is None else Foreign(answer.hidden_RD, ids_Q, spans_G4)
