"""What is learnt on an answer by who gave it: which teachers are asked about it, and the weights of the loss terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_opd.config import AnswersConfig, TeacherConfig
from megatron_opd.config.models import ensemble_weights
from megatron_opd.core.types import MicroBatch, Rollout


def teacher_weights(teachers: Sequence[TeacherConfig], answers: AnswersConfig, rollout: Rollout) -> list[float]:
    """Ensemble weights of all teachers for a rollout, in their order; all 0 where none is asked about it."""
    weights = ensemble_weights(teachers, rollout.prompt.source)
    is_asked = rollout.origin == "student" or answers.distill_alpha > 0
    return weights if is_asked else [0.0] * len(weights)


def weighted(
    teachers: Sequence[TeacherConfig],
    answers: AnswersConfig,
    batches: Sequence[MicroBatch],
    rollouts: Sequence[Rollout],
) -> list[MicroBatch]:
    """The micro-batches of the rollouts, in order, with weights by token; untouched where every answer is the
    student's by the settings."""
    if answers.lmbda >= 1:
        return list(batches)
    made, start = [], 0
    for batch in batches:
        part = rollouts[start : start + len(batch.tokens_BS)]
        start += len(part)
        is_ours = [r.origin == "student" for r in part]
        sft = [0.0 if ours else answers.sft_alpha for ours in is_ours]
        made.append(
            replace(
                batch,
                distill_T=_by_token(part, [_distilled(teachers, answers, r) for r in part], batch),
                sft_T=_by_token(part, sft, batch),
                on_policy_T=_by_token(part, [float(ours) for ours in is_ours], batch) > 0,
            )
        )
    return made


def _distilled(teachers: Sequence[TeacherConfig], answers: AnswersConfig, rollout: Rollout) -> float:
    if not any(teacher_weights(teachers, answers, rollout)):
        return 0.0
    return 1.0 if rollout.origin == "student" else answers.distill_alpha


def _by_token(rollouts: Sequence[Rollout], values: Sequence[float], batch: MicroBatch) -> torch.Tensor:
    per_token = [value for rollout, value in zip(rollouts, values, strict=True) for _ in rollout.logps]
    return torch.tensor(per_token, dtype=torch.float32, device=batch.targets_T.device)
