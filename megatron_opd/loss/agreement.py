"""Top-1 agreement: the share of tokens at which the student's likeliest next token is the teachers'. Measured only.

A teacher that tells hidden states or a list of ids says what its likeliest token is; one that tells the sampled token
alone does not, and tokens with such a teacher do not count.

Shape suffixes: T learnt tokens of a micro-batch, C tokens of a chunk, L local vocabulary columns, N teachers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_opd.core.batching import select
from megatron_opd.core.scores import Level, TokenRows
from megatron_opd.core.types import MicroBatch
from megatron_opd.loss.fused import Logits
from megatron_opd.loss.metrics import Sums, added, sums
from megatron_opd.loss.targets import Target, Targets
from megatron_opd.loss.term import TeacherTerm
from megatron_opd.loss.told import chunks


def metric_names(term: TeacherTerm) -> list[str]:
    """Names of `measure`, in the order of tables."""
    return [f"agreement/{name}" for name in ("ensemble", *(teacher.name for teacher in term.teachers))]


@torch.no_grad()
def measure(term: TeacherTerm, batch: MicroBatch, student: Logits) -> Sums:
    """The agreement with the combined teachers, and with each one at the tokens that it was asked about."""
    asked_T = (batch.weights_TN > 0).any(-1)
    at_T, asked = asked_T.nonzero()[:, 0], select(batch, asked_T)
    targets = Targets(term.config, term.vocab, term.heads)
    found: Sums = {}
    for level, rows in chunks(asked, term.config.chunk_tokens):
        if level is not Level.SAMPLED:
            ours_C = term.vocab.likeliest(logits_at(student, at_T[rows]))
            theirs = _of_teachers(term, targets.at(asked, rows, level), asked.weights_TN[rows] > 0)
            same = {name: (ours_C[on] == ids_C[on]).double() for name, (ids_C, on) in theirs.items()}
            found = added(found, sums(same))
    return found


def _of_teachers(
    term: TeacherTerm, target: Target, asked_CN: torch.Tensor
) -> dict[str, tuple[torch.Tensor, TokenRows]]:
    """By metric: the likeliest ids at the tokens of a chunk [C], and the tokens at which they count."""
    ensemble, *names = metric_names(term)
    assert target.logp is not None
    whole = term.vocab.likeliest(target.logp) if target.outcomes is None else target.outcomes.likeliest(target.logp)
    found: dict[str, tuple[torch.Tensor, TokenRows]] = {ensemble: (whole, slice(None))}
    for n, (name, told) in enumerate(zip(names, target.told, strict=True)):
        if told is not None and told.logp_CL is not None:
            found[name] = term.vocab.likeliest(told.logp_CL), asked_CN[:, n]
        elif told is not None and target.outcomes is not None:
            over_CO = told.over(target.outcomes)
            if over_CO is not None:
                found[name] = target.outcomes.likeliest(over_CO), asked_CN[:, n]
    return found


def logits_at(student: Logits, rows_C: torch.Tensor) -> torch.Tensor:
    """This shard's columns of the student's logits at some tokens, [C, L] float32."""
    if isinstance(student, torch.Tensor):
        return student[rows_C].float()
    head_LD, hidden_CD = student.head_LD, student.hidden_TD[rows_C]
    return (F.linear(hidden_CD, head_LD) if isinstance(head_LD, torch.Tensor) else head_LD.logits(hidden_CD)).float()
