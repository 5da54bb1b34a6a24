"""A scorer of other tokens, as the loop sees it: what it is asked, what comes back, and how often text is cut anew."""

import pytest
import tiny
import torch

from megatron_opd.core.scores import Hidden
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.crosstok.align import Translation
from megatron_opd.loss.crosstok.matched import Matched
from megatron_opd.teachers.foreign_teacher import ForeignTeacher

ROLLOUTS = [tiny.rollout([1, 2], ids, index=i) for i, ids in enumerate(([3, 4], [5], [6, 7, 8]))]
UNSAID = tiny.rollout([1, 2], [9], index=9)


class Scorer:
    """Tells the ids that it is asked about as hidden states."""

    name, head_LD = "t", torch.zeros(20, 1)

    def __init__(self):
        self.submitted = []

    def submit(self, rollout):
        self.submitted.append(rollout)

    def score(self, rollouts):
        return [Hidden(torch.tensor(r.learnt_ids, dtype=torch.float32)[:, None]) for r in rollouts]


class Translator:
    """Every token is its successor, but 9, which the teacher cannot say."""

    def __init__(self):
        self.asked = []

    def translate(self, ids, learnt):
        self.asked.append(ids)
        if 9 in ids:
            return Translation((), (), ())
        spans = tuple((i, i + 1, i, i + 1) for i in range(sum(learnt)))
        return Translation(tuple(i + 1 for i in ids), learnt, spans)


@pytest.fixture
def teacher():
    nothing = torch.arange(0)
    matched = Matched(nothing, nothing, nothing, nothing)
    return ForeignTeacher(Scorer(), Translator(), vocab=VocabShard.whole(20), matched=matched)


def test_scores_are_of_the_teachers_tokens(teacher):
    scores = teacher.score([ROLLOUTS[0], UNSAID, ROLLOUTS[2]])
    assert [score.ids_Q.tolist() for score in scores] == [[4, 5], [], [7, 8, 9]]
    assert [score.hidden_QD[:, 0].tolist() for score in scores] == [[4, 5], [], [7, 8, 9]]
    assert scores[1].spans_G4.shape == (0, 4)


@pytest.mark.parametrize("submitted", [[], ROLLOUTS[:2], [*ROLLOUTS, UNSAID]], ids=len)
def test_a_response_is_translated_once(teacher, submitted):
    everything = [*ROLLOUTS, UNSAID]
    for rollout in submitted:
        teacher.submit(rollout)
    assert [r.token_ids for r in teacher._scorer.submitted] == [(4, 5), (6,), (7, 8, 9)][: len(submitted)]
    scores = teacher.score(everything)
    assert sorted(teacher._translator.asked) == sorted(r.token_ids for r in everything)
    assert [len(score.ids_Q) for score in scores] == [2, 1, 3, 0]
    teacher.score(everything)
    assert len(teacher._translator.asked) == 2 * len(everything)  # nothing is kept for longer than it is needed
