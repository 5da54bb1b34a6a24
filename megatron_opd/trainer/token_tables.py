"""Scores of every token of the logged answers by student and teachers, in <run.dir>/tokens (`log.completions_every`).

The student is asked once more, before its update, so what is written is about the weights that the step began with, as
the teachers' scores are. Nothing of it reaches the training: no gradient, no random number.

Shape suffixes: T learnt tokens of a micro-batch, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from megatron_opd.core.parallel import Parallel
from megatron_opd.core.types import MicroBatch, Rollout
from megatron_opd.loss import by_token
from megatron_opd.loss.crosstok.pieces import read_pieces
from megatron_opd.loss.fused import Logits
from megatron_opd.loss.term import TeacherTerm
from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.tracking import token_file

if TYPE_CHECKING:
    from megatron_opd.student.student import Student

CANDIDATES = 5
"""The likeliest tokens that are kept of each model."""
AnswerScores: TypeAlias = dict[str, np.ndarray]
"""The scores of an answer with R learnt tokens: numbers [R], or [R, K] of candidates, by column; NaN: not known."""


class Texts:
    """The texts of a tokenizer's tokens, for people."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        try:
            self.pieces = read_pieces(tokenizer).of_id
        except ValueError:  # a decoder that nobody has taken apart
            self.pieces = ()

    def of(self, token_id: int) -> str:
        """Bytes that are no whole characters as \\xNN, special tokens by their names."""
        piece = self.pieces[token_id] if token_id < len(self.pieces) else None
        if piece is not None:
            return piece.decode("utf-8", "backslashreplace")
        name = self.tokenizer.hf.convert_ids_to_tokens(token_id)
        return f"<{token_id}>" if name is None else str(name)


def measured(
    student: Student,
    term: TeacherTerm,
    *,
    rollouts: Sequence[Rollout],
    batches: Sequence[MicroBatch],
    parallel: Parallel,
) -> tuple[list[Rollout], list[AnswerScores]]:
    """The answers of all replicas, of this one's `rollouts`, which `batches` begin with; and by answer what `by_token`
    measures, the sampler's log-probabilities and the advantages, of its learnt tokens. Collective over all ranks."""
    these = _covering(batches, len(rollouts))
    found = student.measure(these, partial(_read, term))
    both = zip(these[: len(found)], found, strict=True)
    mine = [its for batch, columns in both for its in _by_answer(batch, columns)]
    answers = list(rollouts) if parallel.is_leader else []
    columns = mine[: len(rollouts)] if parallel.counts_whole else []
    everyone = sorted(parallel.gather_world((parallel.data_rank, answers, columns)), key=lambda one: one[0])
    return [x for _, its, _ in everyone for x in its], [x for _, _, its in everyone for x in its]


def write(
    run_dir: Path, step: int, *, rollouts: Sequence[Rollout], columns: Sequence[AnswerScores], texts: Texts
) -> None:
    """The file of a step's answers; none without an answer. Raises OSError."""
    both = enumerate(zip(rollouts, columns, strict=True))
    scored = [
        token_file.ScoredAnswer(
            row=_row(r, texts.tokenizer, step, i), token_ids=r.token_ids, learnt=r.learnt, columns=its
        )
        for i, (r, its) in both
    ]
    if scored:
        token_file.write(token_file.path_of(run_dir, step), scored, texts.of)


def _row(rollout: Rollout, tokenizer: Tokenizer, step: int, number: int) -> dict[str, Any]:
    """The facts about an answer as a whole; `number` counts the step's from 0."""
    return {
        "step": step,
        "answer": number,
        "source": rollout.prompt.source,
        "index": rollout.prompt.index,
        "sample": rollout.sample,
        "part": rollout.part,
        "origin": rollout.origin,
        "finish": rollout.finish,
        "turns": rollout.log.turns,
        "calls": rollout.log.calls,
        "ended": rollout.log.ended,
        "reward": rollout.reward,
        "prompt": rollout.prompt.text,
        "response": tokenizer.decode(rollout.token_ids),
    }


def _covering(batches: Sequence[MicroBatch], count: int) -> list[MicroBatch]:
    """The first micro-batches, which hold `count` answers or more."""
    found: list[MicroBatch] = []
    for batch in batches:
        if sum(len(b.lengths) for b in found) < count:
            found.append(batch)
    return found


def _read(term: TeacherTerm, batch: MicroBatch, student: Logits) -> dict[str, torch.Tensor]:
    columns = by_token.measure(term, batch, student, CANDIDATES)
    sampler_T = batch.behaviour_logp_T.double().masked_fill(~batch.on_policy_T, torch.nan)
    advantage_T = batch.weights_T.get("policy", torch.full_like(sampler_T, torch.nan))
    return {"logp_sampler": sampler_T, "advantage": advantage_T.double(), **columns}


def _by_answer(batch: MicroBatch, columns: dict[str, torch.Tensor]) -> list[AnswerScores]:
    """By answer its learnt tokens' part of the columns [T, ...]."""
    counts = torch.bincount(batch.sequence_T, minlength=len(batch.lengths)).tolist()
    split = {name: x.float().cpu().split(counts) for name, x in columns.items()}
    return [{name: x[i].numpy() for name, x in split.items()} for i in range(len(counts))]
