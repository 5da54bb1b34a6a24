"""Scores of every learnt token by student and teachers, for people to look at (`log.completions_every`).

All of it is at `loss.temperature`, as the divergence that is trained is; a teacher that lists its likeliest ids tells
them as they came. NaN stands for whatever is not known: tokens that a teacher was not asked about, candidates of one
that knows the sampled token alone, and all but log-probabilities of one that has a tokenizer of its own.

Shape suffixes: T learnt tokens of a micro-batch, C tokens of a chunk, L local vocabulary columns, K candidates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_opd.core.batching import select
from megatron_opd.core.scores import Level, TokenRows
from megatron_opd.core.types import MicroBatch
from megatron_opd.core.vocab import PADDING_LOGP
from megatron_opd.loss import reverse_kl
from megatron_opd.loss.agreement import logits_at
from megatron_opd.loss.fused import Logits
from megatron_opd.loss.listed_ids import Outcomes
from megatron_opd.loss.targets import Target, Targets
from megatron_opd.loss.term import TeacherTerm
from megatron_opd.loss.told import StudentLogps, Told, chunks
from megatron_opd.tracking.token_file import TOP_ID, TOP_LOGP


@torch.no_grad()
def measure(term: TeacherTerm, batch: MicroBatch, student: Logits, candidates: int) -> dict[str, torch.Tensor]:
    """Float64 [T], and [T, candidates] for the likeliest tokens, by name; the same on every shard.

    `logp` and `entropy` are the student's, `logp_target` is the combined teachers', `kl` is KL(student || target) as
    far as the target is known, `logp/NAME` and `kl/NAME` are a teacher's alone. Candidates that are NaN are not there.
    """
    found = _nothing(term, batch, candidates)
    for rows_C in torch.arange(len(batch.targets_T), device=batch.targets_T.device).split(term.config.chunk_tokens):
        _put(found, rows_C, _of_student(term, batch, rows_C, student, candidates))
    asked_T = (batch.weights_TN > 0).any(-1)
    at_T, asked = asked_T.nonzero()[:, 0], select(batch, asked_T)
    if all(score is None for score in asked.teachers):  # none of them speaks of single tokens of the student
        logp_TN = term.each_teachers_logp(batch).double()
        for n, teacher in enumerate(term.teachers):
            found[f"logp/{teacher.name}"] = logp_TN[:, n].masked_fill(logp_TN[:, n] == 0, torch.nan)
        return found
    for level, rows in chunks(asked, term.config.chunk_tokens):
        logits_CL = logits_at(student, at_T[rows])
        _put(found, at_T[rows], _of_teachers(term, asked, rows, level, logits_CL=logits_CL, candidates=candidates))
    return found


def _nothing(term: TeacherTerm, batch: MicroBatch, candidates: int) -> dict[str, torch.Tensor]:
    """Every column, before anything is known."""
    models = ["", *(f"/{teacher.name}" for teacher in term.teachers)]
    plain = [
        "entropy",
        "kl",
        "logp_target",
        *(f"logp{model}" for model in models),
        *(f"kl{model}" for model in models[1:]),
    ]
    lists = [f"{name}{model}" for model in models for name in (TOP_ID, TOP_LOGP)]
    shape_T = (len(batch.targets_T),)
    like = {"dtype": torch.float64, "device": batch.targets_T.device}
    found = {name: torch.full(shape_T, torch.nan, **like) for name in plain}
    return found | {name: torch.full((*shape_T, candidates), torch.nan, **like) for name in lists}


def _put(found: dict[str, torch.Tensor], rows_C: torch.Tensor, columns: dict[str, torch.Tensor]) -> None:
    for name, x in columns.items():
        x = x.double()
        found[name][rows_C] = x if x.dim() == 1 else F.pad(x, (0, found[name].shape[1] - x.shape[1]), value=torch.nan)


def _of_student(
    term: TeacherTerm, batch: MicroBatch, rows_C: torch.Tensor, student: Logits, candidates: int
) -> dict[str, torch.Tensor]:
    logp_CL = term.vocab.log_softmax(logits_at(student, rows_C), term.config.temperature)
    ids_CK, top_CK = _real(*term.vocab.candidates(logp_CL, candidates))
    sampled_C = term.vocab.gather(logp_CL, batch.targets_T[rows_C, None])[:, 0]
    entropy_C = -term.vocab.sum(logp_CL.exp() * logp_CL)
    return {"logp": sampled_C, "entropy": entropy_C, TOP_ID: ids_CK, TOP_LOGP: top_CK}


def _of_teachers(
    term: TeacherTerm,
    asked: MicroBatch,
    rows: TokenRows,
    level: Level,
    *,
    logits_CL: torch.Tensor,
    candidates: int,
) -> dict[str, torch.Tensor]:
    """At tokens that a teacher was asked about, `rows` of `asked`; `logits_CL` are the student's there."""
    targets = Targets(term.config, term.vocab, term.heads)
    target = targets.at(asked, rows, level)
    student_CL = term.vocab.log_softmax(logits_CL, term.config.temperature)
    student = targets.student(student_CL, asked.targets_T[rows], target)
    found = {"kl": _kl(term, student, target), "logp_target": target.sampled_C}
    for n, (teacher, told) in enumerate(zip(term.teachers, target.told, strict=True)):
        if told is None:
            continue
        of_it = {"logp": told.sampled_C, "kl": told.reverse_kl(student)}
        if (top := _candidates(term, told, target.outcomes, candidates)) is not None:
            of_it |= dict(zip((TOP_ID, TOP_LOGP), top, strict=True))
        asked_C = asked.weights_TN[rows, n] > 0
        for name, x in of_it.items():
            found[f"{name}/{teacher.name}"] = x.double().masked_fill(
                ~(asked_C if x.dim() == 1 else asked_C[:, None]), torch.nan
            )
    return found


def _kl(term: TeacherTerm, student: StudentLogps, target: Target) -> torch.Tensor:
    """As the metric `kl/ensemble`, by token."""
    if target.logp is None:
        return student.sampled_C - target.sampled_C
    if target.outcomes is None:
        return reverse_kl(student.logp_CL, target.logp, term.vocab)
    assert student.logp_CO is not None
    return reverse_kl(student.logp_CO, target.logp, target.outcomes.space)


def _candidates(
    term: TeacherTerm, told: Told, outcomes: Outcomes | None, count: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(ids, log-probabilities) of a teacher's likeliest tokens, [C, K] each, the likeliest first; None: not known."""
    if told.logp_CL is not None:
        return _real(*term.vocab.candidates(told.logp_CL, count))
    over_CO = None if outcomes is None else told.over(outcomes)
    if outcomes is None or over_CO is None:
        return None
    listed_CU = over_CO[:, :-1]  # the last outcome is the rest
    top = listed_CU.topk(min(count, listed_CU.shape[-1]), dim=-1)
    return _real(outcomes.ids_TU.gather(-1, top.indices), top.values)


def _real(ids_CK: torch.Tensor, logp_CK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64, with NaN for what only fills: ids beyond the vocabulary, and those that a teacher did not list."""
    fills_CK = logp_CK <= PADDING_LOGP
    return ids_CK.double().masked_fill(fills_CK, torch.nan), logp_CK.double().masked_fill(fills_CK, torch.nan)
