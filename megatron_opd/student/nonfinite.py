"""Loss or gradient that is not finite: where it comes from. Looked for only once it has happened.

Shape suffixes: T learnt tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron_opd.core.scores import Head
from megatron_opd.core.types import MicroBatch
from megatron_opd.loss.fused import FactoredLogits, Logits
from megatron_opd.loss.objective import Objective

_NAMED = 3
"""Parameters that a message names."""


@dataclass(frozen=True, order=True, slots=True)
class Token:
    """A learnt token whose loss is not finite, as one rank sees it."""

    replica: int
    micro_batch: int
    row: int
    """Sequence of the micro-batch, from 0."""
    position: int
    """Of the token that the loss is about, in its sequence, prompt included, from 0."""
    causes: tuple[str, ...]
    """What of it, on this rank, is not finite."""


def tokens(objective: Objective, batch: MicroBatch, student: Logits, place: tuple[int, int]) -> list[Token]:
    """Those of a micro-batch; `place` is (replica, micro-batch)."""
    if not len(batch.predicted_at_T):
        return []
    wrong_T = ~objective.by_token(batch, student).isfinite()
    found = []
    for t in wrong_T.nonzero()[:, 0].tolist():
        predicts = int(batch.predicted_at_T[t]) % batch.tokens_BS.shape[1]
        causes = tuple(_causes(objective, batch, student, t))
        found.append(Token(*place, int(batch.sequence_T[t]), predicts + 1, causes))
    return found


def _causes(objective: Objective, batch: MicroBatch, student: Logits, t: int) -> Iterable[str]:
    values_TD = student.hidden_TD if isinstance(student, FactoredLogits) else student
    if not _is_finite(values_TD[t]):
        yield "the student's hidden states" if isinstance(student, FactoredLogits) else "the student's logits"
    if isinstance(student, FactoredLogits) and not _is_finite(student.head_LD):
        yield "the student's output head"
    for n, (teacher, score) in enumerate(zip(objective.distillation.teachers, batch.teachers, strict=True)):
        if score is None or not batch.weights_TN[t, n] > 0:
            continue
        if not _is_finite(score.numbers_at(t)):
            yield f"what teacher '{teacher.name}' told"
        head_LD = objective.distillation.heads[n]
        if head_LD is not None and not _is_finite(head_LD):
            yield f"the output head of teacher '{teacher.name}'"


def first(by_rank: Sequence[Sequence[Token]]) -> str:
    """What all ranks saw, in a line."""
    seen: dict[tuple[int, int, int, int], list[str]] = {}
    for token in sorted(token for mine in by_rank for token in mine):
        seen.setdefault((token.replica, token.micro_batch, token.row, token.position), []).extend(token.causes)
    if not seen:
        return "but not when it is computed again"
    (replica, micro_batch, row, position), causes = next(iter(seen.items()))
    why = f"not finite: {', '.join(dict.fromkeys(causes))}" if causes else "all that it is made of is finite"
    more = f", and {len(seen) - 1} more tokens" if len(seen) > 1 else ""
    return f"at replica {replica}, micro-batch {micro_batch}, row {row}, position {position}{more} ({why})"


def parameters(model: torch.nn.Module) -> list[str]:
    """Names of this rank's first parameters whose gradient is not finite."""
    named = ((name, getattr(p, "main_grad", None)) for name, p in model.named_parameters())
    return [name for name, grad in named if grad is not None and not _is_finite(grad)][:_NAMED]


def _is_finite(x: Head) -> bool:
    return bool(x.isfinite().all()) if isinstance(x, torch.Tensor) else x.is_finite()
