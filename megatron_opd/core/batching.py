"""Rollouts and teacher scores -> micro-batches. The one place where the next-token shift happens.

A sequence is a prompt and all tokens behind it, padded on the right. The output at position i predicts token i + 1, so
token i behind a prompt of P tokens is predicted at position P - 1 + i. Only the positions that predict learnt tokens
are listed. So the prompt, what something else wrote, and the padding are out of the loss by construction, whatever ids
they carry (pad == eos is safe); a position that predicts a learnt token may itself hold one that is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import Literal

import torch

from megatron_opd.core.parallel import Parallel
from megatron_opd.core.protocols import Lost
from megatron_opd.core.scores import TeacherScore, joined
from megatron_opd.core.types import MicroBatch, Rollout

EnsembleWeights = Sequence[Sequence[float]]
"""Ensemble weights by rollout, then by teacher."""
Scores = Sequence[Sequence[TeacherScore | None]]
"""By teacher, then by rollout; None where a teacher was not asked, or did not answer."""
Packing = Literal["none", "own", "shared"]
"""How models see the sequences of a micro-batch: padded; or behind each other in one row, as long as they need it, or
as long as the longest row of all micro-batches: pipeline stages exchange one shape."""


class NoTeacherLeft(Lost):
    """No teacher answered about a rollout."""


def renormalised(rollouts: Sequence[Rollout], weights: EnsembleWeights, scores: Scores) -> list[list[float]]:
    """The teachers' weights by rollout without those that did not answer, the others raised to sum to 1 again.

    Rollouts that lack no answer, or about which no teacher is asked, keep theirs bit by bit. Raises NoTeacherLeft.
    """
    made = []
    for i, (rollout, row) in enumerate(zip(rollouts, weights, strict=True)):
        left = [w if per_teacher[i] is not None else 0.0 for w, per_teacher in zip(row, scores, strict=True)]
        total = sum(left)
        if not total and any(row):
            prompt = f"prompt {rollout.prompt.index} of source '{rollout.prompt.source}'"
            raise NoTeacherLeft(f"none of the teachers of {prompt} answered")
        made.append(list(row) if left == list(row) else [w / total for w in left])
    return made


def packing_for(is_on: bool, parallel: Parallel) -> Packing:
    """How they are packed on this layout, where they are (`train.packing`)."""
    return ("shared" if parallel.pipeline_size > 1 else "own") if is_on else "none"


def padded_length(rollouts: Sequence[Rollout], multiple: int = 1) -> int:
    """Longest sequence of the rollouts, rounded up to a multiple."""
    return _rounded_up(max(_lengths(rollouts)), multiple)


def pack(
    rollouts: Sequence[Rollout],
    *,
    micro_batch_size: int,
    length_multiple: int,
    device: torch.device,
    scores: Scores = (),
    weights: EnsembleWeights = (),
    packing: Packing = "none",
) -> list[MicroBatch]:
    """Micro-batches of `micro_batch_size` rollouts each (the last may be smaller), in order, equally padded.

    `weights[i]` are the teachers' ensemble weights for rollout i. Without scores the micro-batches carry tokens only.
    Rows, where there are some, are a multiple of `length_multiple` too.
    """
    length = padded_length(rollouts, length_multiple)
    parts = [slice(start, start + micro_batch_size) for start in range(0, len(rollouts), micro_batch_size)]
    totals = [_rounded_up(sum(_lengths(rollouts[part])), length_multiple) for part in parts]
    batches = []
    for part, total in zip(parts, totals, strict=True):
        learnt = [rollout.learnt_ids for rollout in rollouts[part]]
        told = tuple(joined(per_teacher[part], learnt, device) for per_teacher in scores)
        row_length = {"none": length, "own": total, "shared": max(totals)}[packing]
        its = _weights(rollouts[part], weights[part]).to(device), told
        batches.append(_packed(rollouts[part], its, (length, row_length), is_packed=packing != "none"))
    return batches


def _packed(
    rollouts: Sequence[Rollout],
    teachers: tuple[torch.Tensor, tuple[TeacherScore | None, ...]],
    lengths: tuple[int, int],
    *,
    is_packed: bool,
) -> MicroBatch:
    """The micro-batch of some rollouts with the `teachers`' weights and scores; `lengths` are (S, the row's)."""
    weights_TN, told = teachers
    length, row_length = lengths
    device = weights_TN.device
    counts = torch.tensor([r.num_learnt for r in rollouts])
    logp_T = torch.tensor([x for r in rollouts for x in r.logps], dtype=torch.float32, device=device)
    return MicroBatch(
        tokens_BS=_tokens(rollouts, length).to(device),
        lengths=_lengths(rollouts),
        is_packed=is_packed,
        row_length=row_length,
        sequence_T=torch.arange(len(rollouts)).repeat_interleave(counts).to(device),
        predicted_at_T=_predicted_at(rollouts, length).to(device),
        targets_T=torch.tensor([t for r in rollouts for t in r.learnt_ids], dtype=torch.long, device=device),
        behaviour_logp_T=logp_T,
        weights_TN=weights_TN,
        teachers=told,
        weights_T={"distill": torch.ones_like(logp_T)},
        on_policy_T=torch.ones_like(logp_T, dtype=torch.bool),
    )


def _lengths(rollouts: Sequence[Rollout]) -> tuple[int, ...]:
    return tuple(len(r.prompt.token_ids) + len(r.token_ids) for r in rollouts)


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _tokens(rollouts: Sequence[Rollout], length: int) -> torch.Tensor:
    padding = (0,) * length
    return torch.tensor([(*r.prompt.token_ids, *r.token_ids, *padding)[:length] for r in rollouts], dtype=torch.long)


def _predicted_at(rollouts: Sequence[Rollout], length: int) -> torch.Tensor:
    starts = [b * length + len(r.prompt.token_ids) - 1 for b, r in enumerate(rollouts)]
    places = [range(start, start + len(r.learnt)) for start, r in zip(starts, rollouts, strict=True)]
    at_T = [at for r, ours in zip(rollouts, places, strict=True) for at in compress(ours, r.learnt)]
    return torch.tensor(at_T, dtype=torch.long)


def _weights(rollouts: Sequence[Rollout], weights: EnsembleWeights) -> torch.Tensor:
    rows = [w for r, w in zip(rollouts, weights, strict=True) for _ in r.logps] if weights else []
    shape = sum(r.num_learnt for r in rollouts), len(weights[0]) if weights else 0
    return torch.tensor(rows, dtype=torch.float32).reshape(shape)


def select(batch: MicroBatch, keep_T: torch.Tensor) -> MicroBatch:
    """The micro-batch with some of its learnt tokens (bool) only."""
    by_token = ("sequence_T", "predicted_at_T", "targets_T", "behaviour_logp_T", "weights_TN", "on_policy_T")
    kept = {name: getattr(batch, name)[keep_T] for name in by_token}
    weights_T = {term: weight_T[keep_T] for term, weight_T in batch.weights_T.items()}
    teachers = tuple(None if score is None else score.at(keep_T) for score in batch.teachers)
    return replace(batch, teachers=teachers, weights_T=weights_T, **kept)
