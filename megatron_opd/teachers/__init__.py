"""The models that score the student's tokens."""

from __future__ import annotations

from megatron_opd.config import Config
from megatron_opd.parallel import Parallel
from megatron_opd.types import TeacherScorer
from megatron_opd.vocab import VocabShard


def build_teachers(config: Config, parallel: Parallel, vocab: VocabShard) -> list[TeacherScorer]:
    """All teachers of the config, in its order. `vocab` is this rank's shard of the student's vocabulary."""
    from megatron_opd.teachers.megatron import MegatronTeacher

    return [
        MegatronTeacher(teacher, parallel, vocab, micro_batch_size=config.train.micro_batch_size)
        for teacher in config.teachers
    ]
