"""How likely each teacher finds whole answers: the sums of its log-probabilities, for tables of answers.

Shape suffixes: T response tokens of a micro-batch, B its answers, N teachers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_opd.crosstok.term import CrossTokenizer
from megatron_opd.parallel import Parallel
from megatron_opd.terms.distillation import Distillation
from megatron_opd.types import MicroBatch

AnswerLogps = list[dict[str, float | None]]
"""An answer after the other: by teacher, the log-probability in nats; None where it was not asked about the answer."""


def answer_logps(
    distillation: Distillation | CrossTokenizer, batches: Sequence[MicroBatch], count: int, parallel: Parallel
) -> AnswerLogps:
    """Of the first `count` answers of this replica, on all its ranks. Collective over all ranks."""
    names = [teacher.name for teacher in distillation.teachers]
    if not names:
        return [{} for _ in range(count)]
    mine: AnswerLogps = []
    for batch in batches if parallel.is_last_stage else []:
        if len(mine) < count:
            mine += [dict(zip(names, sums, strict=True)) for sums in _sums(distillation, batch)]
    everyone = parallel.gather_world((parallel.data_rank, parallel.is_last_stage, mine))
    return next(found for replica, knows, found in everyone if knows and replica == parallel.data_rank)[:count]


def _sums(distillation: Distillation | CrossTokenizer, batch: MicroBatch) -> list[list[float | None]]:
    """By answer, then by teacher."""
    logp_TN = distillation.each_teachers_logp(batch).double()
    answer_T = batch.rows_T // batch.tokens_BS.shape[1]
    sums_BN = logp_TN.new_zeros(len(batch.tokens_BS), logp_TN.shape[1]).index_add(0, answer_T, logp_TN)
    asked_BN = torch.zeros_like(sums_BN).index_add(0, answer_T, (batch.weights_TN > 0).double()) > 0
    both = zip(sums_BN.tolist(), asked_BN.tolist(), strict=True)
    return [[x if is_asked else None for x, is_asked in zip(*row, strict=True)] for row in both]
