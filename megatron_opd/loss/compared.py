"""What every kind of distillation knows about each token, and the metrics that follow from it.

Shape suffixes: C tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_opd.core.scores import TokenRows
from megatron_opd.core.types import MicroBatch
from megatron_opd.loss.metrics import Columns


@dataclass(frozen=True, slots=True)
class Compared:
    """Student and teachers at some tokens of a micro-batch, without gradients."""

    loss_C: torch.Tensor
    """Weighted by `distill_T`."""
    reverse_kl_C: torch.Tensor
    """KL(student || target)."""
    by_teacher: Sequence[torch.Tensor]
    """KL(student || teacher) at the tokens that each teacher was asked about."""
    student_C: torch.Tensor
    """Log-probabilities of the sampled tokens: the student's, the target's, the student's at the sampler's
    temperature."""
    target_C: torch.Tensor
    sampler_C: torch.Tensor


def metric_names(teachers: Sequence[str]) -> list[str]:
    """Names of `columns`, in the order of tables."""
    kls = [f"kl/{name}" for name in teachers]
    return ["loss", "kl/ensemble", *kls, "logprob/student", "logprob/teacher", "mismatch/kl"]


def columns(found: Compared, teachers: Sequence[str], batch: MicroBatch, rows: TokenRows = slice(None)) -> Columns:
    """The metrics of the tokens `rows`."""
    return {
        "loss": found.loss_C,
        "kl/ensemble": found.reverse_kl_C,
        **{f"kl/{name}": kl_C for name, kl_C in zip(teachers, found.by_teacher, strict=True)},
        "logprob/student": found.student_C,
        "logprob/teacher": found.target_C,
        "mismatch/kl": mismatch(found.sampler_C, batch, rows),
    }


def mismatch(sampler_C: torch.Tensor, batch: MicroBatch, rows: TokenRows = slice(None)) -> torch.Tensor:
    """k3 estimate of KL(sampler || trainer) on the student's own tokens (Schulman): never negative, 0 when the two
    agree. `sampler_C`: the student's log-probabilities at the sampler's temperature."""
    lag_C = (sampler_C - batch.behaviour_logp_T[rows])[batch.on_policy_T[rows]]
    return lag_C.exp() - 1 - lag_C
