"""The weights of the loss terms by who gave an answer, for runs in which the student is not the only one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_opd.config import AnswersConfig
from megatron_opd.core.batching import EnsembleWeights
from megatron_opd.core.types import MicroBatch, Rollout


def weighted(
    answers: AnswersConfig, batches: Sequence[MicroBatch], rollouts: Sequence[Rollout], weights: EnsembleWeights
) -> list[MicroBatch]:
    """The micro-batches of the rollouts, in order, with weights by token. `weights` are the teachers', by rollout."""
    made, start = [], 0
    for batch in batches:
        its = slice(start, start + len(batch.tokens_BS))
        part, start = rollouts[its], its.stop
        distill = [_distilled(answers, r, any(row)) for r, row in zip(part, weights[its], strict=True)]
        is_ours = [r.origin == "student" for r in part]
        sft = [0.0 if ours else answers.sft_alpha for ours in is_ours]
        made.append(
            replace(batch, on_policy_T=_by_token(part, [float(ours) for ours in is_ours], batch) > 0).weighing(
                distill=_by_token(part, distill, batch), sft=_by_token(part, sft, batch)
            )
        )
    return made


def _distilled(answers: AnswersConfig, rollout: Rollout, is_asked: bool) -> float:
    if not is_asked:
        return 0.0
    return 1.0 if rollout.origin == "student" else answers.distill_alpha


def _by_token(rollouts: Sequence[Rollout], values: Sequence[float], batch: MicroBatch) -> torch.Tensor:
    per_token = [value for rollout, value in zip(rollouts, values, strict=True) for _ in rollout.logps]
    return torch.tensor(per_token, dtype=torch.float32, device=batch.targets_T.device)
