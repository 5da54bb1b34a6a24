"""Rollouts and teacher scores -> micro-batches. The one place where the next-token shift happens.

A sequence is a prompt and all tokens behind it, padded on the right. The output at position i predicts token i + 1, so
token i behind a prompt of P tokens is predicted at position P - 1 + i. Only the positions that predict learnt tokens
are listed. So the prompt, what something else wrote, and the padding are out of the loss by construction, whatever ids
they carry (pad == eos is safe); a position that predicts a learnt token may itself hold one that is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from megatron_opd.core.parallel import Parallel
from megatron_opd.core.types import Foreign, Hidden, MicroBatch, Rollout, Sampled, TeacherScore, TopK

EnsembleWeights = Sequence[Sequence[float]]
"""Ensemble weights by rollout, then by teacher."""
Scores = Sequence[Sequence[TeacherScore | None]]
"""By teacher, then by rollout; None where a teacher was not asked, or did not answer."""
Packing = Literal["none", "own", "shared"]
"""How models see the sequences of a micro-batch: padded; or behind each other in one row, as long as they need it, or
as long as the longest row of all micro-batches: pipeline stages exchange one shape."""


class NoTeacherLeft(RuntimeError):
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
        told = tuple(_told(rollouts[part], per_teacher[part], device) for per_teacher in scores)
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
        distill_T=torch.ones_like(logp_T),
        advantage_T=torch.zeros_like(logp_T),
        sft_T=torch.zeros_like(logp_T),
        on_policy_T=torch.ones_like(logp_T, dtype=torch.bool),
    )


def _lengths(rollouts: Sequence[Rollout]) -> tuple[int, ...]:
    return tuple(len(r.prompt.token_ids) + len(r.token_ids) for r in rollouts)


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _tokens(rollouts: Sequence[Rollout], length: int) -> torch.Tensor:
    tokens_BS = torch.zeros(len(rollouts), length, dtype=torch.long)
    for row_S, rollout in zip(tokens_BS, rollouts, strict=True):
        ids = (*rollout.prompt.token_ids, *rollout.token_ids)
        row_S[: len(ids)] = torch.tensor(ids)
    return tokens_BS


def _predicted_at(rollouts: Sequence[Rollout], length: int) -> torch.Tensor:
    starts = [b * length + len(r.prompt.token_ids) - 1 for b, r in enumerate(rollouts)]
    learnt = [torch.tensor(r.learnt, dtype=torch.bool).nonzero()[:, 0] for r in rollouts]
    return torch.cat([start + at_R for start, at_R in zip(starts, learnt, strict=True)])


def _weights(rollouts: Sequence[Rollout], weights: EnsembleWeights) -> torch.Tensor:
    rows = [w for r, w in zip(rollouts, weights, strict=True) for _ in r.logps] if weights else []
    shape = sum(r.num_learnt for r in rollouts), len(weights[0]) if weights else 0
    return torch.tensor(rows, dtype=torch.float32).reshape(shape)


def _told(
    rollouts: Sequence[Rollout], scores: Sequence[TeacherScore | None], device: torch.device
) -> TeacherScore | None:
    """A teacher's scores as one about all learnt tokens; zeros for rollouts that it says nothing about.

    None when it says nothing about all of them, or on a rank that does not compute the loss. Raises ValueError for a
    list without the sampled token, whose log-probability would then be another token's.
    """
    lengths = [r.num_learnt for r in rollouts]
    known = next((s for s in scores if s is not None), None)
    if isinstance(known, TopK):
        for rollout, score in zip(rollouts, scores, strict=True):
            if isinstance(score, TopK) and not _lists_sampled(score, rollout):
                raise ValueError("a teacher's list of a token lacks the token that was sampled")
        ids_TK = _joined([s.ids_RK if isinstance(s, TopK) else None for s in scores], lengths)
        logp_TK = _joined([s.logp_RK if isinstance(s, TopK) else None for s in scores], lengths)
        return TopK(ids_TK.to(device), logp_TK.to(device))
    if isinstance(known, Sampled):
        return Sampled(_joined([s.logp_R if isinstance(s, Sampled) else None for s in scores], lengths).to(device))
    if isinstance(known, Foreign):
        return _foreign(scores, lengths, device)
    if known is None or known.hidden_RD is None:
        return None
    return Hidden(_joined([s.hidden_RD if isinstance(s, Hidden) else None for s in scores], lengths))


def _foreign(scores: Sequence[TeacherScore | None], lengths: Sequence[int], device: torch.device) -> Foreign | None:
    """A teacher's own tokens of all rollouts behind each other, and the spans counted along with them."""
    hidden, ids, spans, at, their_at = [], [], [], 0, 0
    for score, length in zip(scores, lengths, strict=True):
        if isinstance(score, Foreign):
            if score.hidden_QD is None:
                return None
            hidden.append(score.hidden_QD)
            ids.append(score.ids_Q)
            spans.append(score.spans_G4 + torch.tensor([at, at, their_at, their_at]))
            their_at += len(score.ids_Q)
        at += length
    return Foreign(torch.cat(hidden), torch.cat(ids).to(device), torch.cat(spans).to(device))


def _lists_sampled(score: TopK, rollout: Rollout) -> bool:
    return bool((score.ids_RK == torch.tensor(rollout.learnt_ids)[:, None]).any(-1).all())


def _joined(rows: Sequence[torch.Tensor | None], lengths: Sequence[int]) -> torch.Tensor:
    """The rollouts' rows behind each other, with zeros for those that are not there (one at least is)."""
    known = next(x for x in rows if x is not None)
    return torch.cat(
        [known.new_zeros(n, *known.shape[1:]) if x is None else x for n, x in zip(lengths, rows, strict=True)]
    )


def select(batch: MicroBatch, keep_T: torch.Tensor) -> MicroBatch:
    """The micro-batch with some of its learnt tokens (bool) only."""
    by_token = ("sequence_T", "predicted_at_T", "targets_T", "behaviour_logp_T", "weights_TN")
    by_token += ("distill_T", "advantage_T", "sft_T", "on_policy_T")
    kept = {name: getattr(batch, name)[keep_T] for name in by_token}
    return replace(batch, teachers=tuple(score_at(score, keep_T) for score in batch.teachers), **kept)


def score_at(score: TeacherScore | None, keep_T: torch.Tensor) -> TeacherScore | None:
    """What is said about some of the tokens (bool) only; None of a teacher with tokens of its own."""
    if isinstance(score, Hidden):
        return Hidden(None if score.hidden_RD is None else score.hidden_RD[keep_T])
    if isinstance(score, TopK):
        return TopK(score.ids_RK[keep_T], score.logp_RK[keep_T])
    return Sampled(score.logp_R[keep_T]) if isinstance(score, Sampled) else None
