"""Rollouts and teacher scores -> micro-batches. The one place where the next-token shift happens.

A sequence is prompt + response, padded on the right. The output at position i predicts token i + 1, so response token
r of a prompt of P tokens is predicted at position P - 1 + r. Only those positions are listed, so the prompt and the
padding are out of the loss by construction, whatever ids they carry (pad == eos is safe).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_opd.types import MicroBatch, Rollout, TeacherScore

Scores = Sequence[Sequence[TeacherScore | None]]
"""By teacher, then by rollout; None where a teacher was not asked."""


def padded_length(rollouts: Sequence[Rollout], multiple: int = 1) -> int:
    """Longest sequence of the rollouts, rounded up to a multiple."""
    longest = max(len(r.prompt.token_ids) + len(r.response_ids) for r in rollouts)
    return -(-longest // multiple) * multiple


def pack(
    rollouts: Sequence[Rollout],
    *,
    micro_batch_size: int,
    length_multiple: int,
    device: torch.device,
    scores: Scores = (),
    weights: Sequence[Sequence[float]] = (),
) -> list[MicroBatch]:
    """Micro-batches of `micro_batch_size` rollouts each (the last may be smaller), in order, equally padded.

    `weights[i]` are the teachers' ensemble weights for rollout i. Without scores the micro-batches carry tokens only.
    """
    length = padded_length(rollouts, length_multiple)
    batches = []
    for start in range(0, len(rollouts), micro_batch_size):
        part = slice(start, start + micro_batch_size)
        batches.append(
            MicroBatch(
                tokens_BS=_tokens(rollouts[part], length).to(device),
                rows_T=_rows(rollouts[part], length).to(device),
                targets_T=torch.tensor([t for r in rollouts[part] for t in r.response_ids], device=device),
                behaviour_logp_T=torch.tensor([x for r in rollouts[part] for x in r.logps], device=device),
                weights_TN=_weights(rollouts[part], weights[part]).to(device),
                teacher_hidden=tuple(_hidden(rollouts[part], per_teacher[part]) for per_teacher in scores),
            )
        )
    return batches


def _tokens(rollouts: Sequence[Rollout], length: int) -> torch.Tensor:
    tokens_BS = torch.zeros(len(rollouts), length, dtype=torch.long)
    for row_S, rollout in zip(tokens_BS, rollouts, strict=True):
        ids = (*rollout.prompt.token_ids, *rollout.response_ids)
        row_S[: len(ids)] = torch.tensor(ids)
    return tokens_BS


def _rows(rollouts: Sequence[Rollout], length: int) -> torch.Tensor:
    starts = [b * length + len(r.prompt.token_ids) - 1 for b, r in enumerate(rollouts)]
    return torch.cat([torch.arange(s, s + len(r.response_ids)) for s, r in zip(starts, rollouts, strict=True)])


def _weights(rollouts: Sequence[Rollout], weights: Sequence[Sequence[float]]) -> torch.Tensor:
    rows = [w for r, w in zip(rollouts, weights, strict=True) for _ in r.response_ids] if weights else []
    return torch.tensor(rows, dtype=torch.float32).reshape(sum(len(r.response_ids) for r in rollouts), -1)


def _hidden(rollouts: Sequence[Rollout], scores: Sequence[TeacherScore | None]) -> torch.Tensor | None:
    """A teacher's rows for all response tokens [T, D]; zeros for rollouts it was not asked about.

    None when it was asked about none of them, or on a rank that does not compute the loss.
    """
    rows = [None if s is None else s.hidden_RD for s in scores]
    known = next((x for x in rows if x is not None), None)
    if known is None:
        return None
    return torch.cat(
        [
            known.new_zeros(len(r.response_ids), known.shape[1]) if x is None else x
            for r, x in zip(rollouts, rows, strict=True)
        ]
    )
