"""Who answers the training prompts: the student, the data set, a teacher, or student and teacher mixed."""

from __future__ import annotations

from megatron_opd.answers.answers import Answers
from megatron_opd.answers.engines import mixed_engines, teacher_engines
from megatron_opd.config import Config
from megatron_opd.types import RolloutEngine


def build_answers(config: Config, engine: RolloutEngine, *, eos_ids: tuple[int, ...], vocab_size: int) -> Answers:
    """For the leader of a replica; `engine` samples from the student. Loads the models of teachers that sample.

    Raises ValueError for a teacher whose weights cannot be loaded.
    """
    teachers = teacher_engines(config, eos_ids=eos_ids, vocab_size=vocab_size)
    return Answers(config, engine, teachers, mixed_engines(config, engine, teachers), eos_ids=eos_ids)
