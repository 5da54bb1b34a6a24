"""The part of a micro-batch's tokens that a term of the loss is about."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_opd.types import Hidden, MicroBatch, Sampled, TeacherScore, TopK


def tokens_of(batch: MicroBatch, keep_R: torch.Tensor) -> MicroBatch:
    """The micro-batch with the tokens at `keep_R` alone, of everything that it has by token."""

    def picked(x_T: torch.Tensor | None) -> torch.Tensor | None:
        return None if x_T is None else x_T[keep_R]

    return replace(
        batch,
        rows_T=batch.rows_T[keep_R],
        targets_T=batch.targets_T[keep_R],
        behaviour_logp_T=batch.behaviour_logp_T[keep_R],
        weights_TN=batch.weights_TN[keep_R],
        teachers=tuple(_told(score, keep_R) for score in batch.teachers),
        distill_T=picked(batch.distill_T),
        sft_T=picked(batch.sft_T),
        on_policy_T=picked(batch.on_policy_T),
    )


def _told(score: TeacherScore | None, keep_R: torch.Tensor) -> TeacherScore | None:
    if isinstance(score, Hidden):
        return score if score.hidden_RD is None else Hidden(score.hidden_RD[keep_R])
    if isinstance(score, TopK):
        return TopK(score.ids_RK[keep_R], score.logp_RK[keep_R])
    return None if score is None else Sampled(score.logp_R[keep_R])
