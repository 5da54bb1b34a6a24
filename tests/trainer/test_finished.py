"""Answers are counted for the step that they are for, also those that come before anybody waits for them."""

from megatron_opd.tracking.phase import Phase
from megatron_opd.trainer.finished import Finished


def test_early_answers_count_and_other_steps_do_not():
    shown, finished = [], Finished()
    phase = Phase("sampling", 9, "answers", show=lambda phase: shown.append(phase.done))
    finished.add(3)
    finished.add(4)
    finished.add(3)
    with finished.told_to(phase, 3):
        finished.add(4)
        finished.add(3)
    assert shown == [2, 3]
    finished.add(3)
    assert phase.done == 3
    later = Phase("sampling", 9, "answers", show=lambda phase: None)
    with finished.told_to(later, 4):
        assert later.done == 2
    with finished.told_to(later, 5):  # of which nothing has come
        assert later.done == 2
