"""Who answers a prompt. That follows from settings, seed and step alone, so it is the same on every rank and layout,
and after a resume."""

from __future__ import annotations

import hashlib

from megatron_opd.config import Config, TeacherConfig
from megatron_opd.types import Prompt


def is_for_student(config: Config, prompt: Prompt, step: int) -> bool:
    """Whether the student answers the prompt in this step, which it does with probability `answers.lmbda` (Agarwal et
    al. 2024, arXiv:2306.13649, algorithm 1, where one number decides for a batch)."""
    text = f"answers/{config.run.seed}/{step}/{prompt.source}/{prompt.index}"
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")
    return number < config.answers.lmbda * 2**48


def sampling_teacher(config: Config, source: str) -> TeacherConfig:
    """The teacher that samples answers to prompts of a source."""
    if config.answers.teacher:
        return next(t for t in config.teachers if t.name == config.answers.teacher)
    weights = config.teacher_weights(source)
    return config.teachers[weights.index(max(weights))]
