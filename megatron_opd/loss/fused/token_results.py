"""From statistics and sums of rows to what they mean: the loss and the metrics of every token.

Shape suffixes: R rows (tokens), N teachers, K statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from megatron_opd.loss.fused.statistics import (
    FIRST,
    GAP_S,
    GAP_T,
    REVERSE,
    S_MAX,
    S_SUM,
    SECOND,
    T_MAX,
    T_SUM,
    LossSpec,
)


@dataclass(frozen=True, slots=True)
class TokenResults:
    """Loss and metrics of each token, float64, without a gradient."""

    loss_R: torch.Tensor
    """The divergence, in nats; NaN where the logits are not finite."""
    reverse_kl_R: torch.Tensor
    """KL(student || target)."""
    teachers_RN: torch.Tensor | None
    """KL(student || teacher), NaN where a teacher was not asked, infinite where it rules a token out; None where
    `by_teacher` was not."""
    student_R: torch.Tensor | None
    """Log-probability of the sampled token under the student; None where no tokens were given, like the next two."""
    target_R: torch.Tensor | None
    """The same under the target."""
    sampler_R: torch.Tensor | None
    """The same under the student at the sampling temperature, if one was given, else at the loss's."""
    is_bad_R: torch.Tensor
    """Whether logits of the student, or of a teacher that was asked, are NaN or infinite (bool). A token that some of
    several teachers with averaged probabilities rule out (-inf) does not count."""

    def sampled(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of the sampled tokens, where they were given: `student_R`, `target_R`, `sampler_R`."""
        assert self.student_R is not None
        assert self.target_R is not None
        assert self.sampler_R is not None
        return self.student_R, self.target_R, self.sampler_R

    @classmethod
    def joined(cls, parts: Sequence[TokenResults]) -> TokenResults:
        """The tokens of several, behind each other."""
        if len(parts) == 1:
            return parts[0]
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        return cls(**{name: None if x[0] is None else torch.cat(x) for name, x in columns.items()})


@dataclass(frozen=True, slots=True)
class SampledLogits:
    """Logits of the sampled tokens, not divided by a temperature."""

    student_R: torch.Tensor
    teachers_RN: torch.Tensor


@torch.no_grad()
def outcome(
    asked: LossSpec,
    weights_RN: torch.Tensor,
    stats_RK: torch.Tensor,
    sums_R3: torch.Tensor | None,
    sampled: SampledLogits | None,
) -> TokenResults:
    """Loss and metrics from the statistics of the whole vocabulary."""
    log_s_R = stats_RK[:, S_SUM].log()
    forward_R = None
    if asked.has_target:
        log_t_R = stats_RK[:, T_SUM].log()
        reverse_R = stats_RK[:, GAP_S] / stats_RK[:, S_SUM] - log_s_R + log_t_R
        forward_R = stats_RK[:, GAP_T] / stats_RK[:, T_SUM] - log_t_R + log_s_R
    else:
        assert sums_R3 is not None
        reverse_R = sums_R3[:, REVERSE]
    if sums_R3 is None:
        loss_R = forward_R if asked.kind == "forward" else reverse_R
    elif asked.kind == "jsd":
        loss_R = asked.beta * sums_R3[:, SECOND] + (1 - asked.beta) * sums_R3[:, FIRST]
    else:
        loss_R = sums_R3[:, FIRST]
    assert loss_R is not None
    is_bad_R = ~(_is_finite(asked, stats_RK) & loss_R.isfinite() & reverse_R.isfinite())
    teachers_RN = None
    if asked.by_teacher:
        teachers_RN = reverse_R[:, None]
        if asked.has_teachers:
            gaps_RN = stats_RK[:, [at.gap_s for at in asked.teachers]] / stats_RK[:, S_SUM, None]
            teachers_RN = gaps_RN - log_s_R[:, None] + stats_RK[:, [at.sum for at in asked.teachers]].log()
        teachers_RN = teachers_RN.masked_fill(weights_RN == 0, math.nan)
    found = _sampled(asked, weights_RN, stats_RK, sampled) if sampled is not None else (None, None, None)
    return TokenResults(loss_R.masked_fill(is_bad_R, math.nan), reverse_R, teachers_RN, *found, is_bad_R)


def _is_finite(asked: LossSpec, stats_RK: torch.Tensor) -> torch.Tensor:
    """Whether the statistics that the loss depends on are finite, [R]. A teacher that rules a token out is infinitely
    far from a student that does not, yet its average with others is not."""
    is_finite_RK = stats_RK.isfinite()
    is_finite_RK[:, [at.gap_s for at in asked.teachers if at.gap_s is not None]] = True
    return is_finite_RK.all(-1)


def _log_normalisers(asked: LossSpec, stats_RK: torch.Tensor) -> torch.Tensor:
    """Log of every teacher's sum of exponentials, [R, N]."""
    return stats_RK[:, [at.max for at in asked.teachers]] + stats_RK[:, [at.sum for at in asked.teachers]].log()


def _sampled(
    asked: LossSpec, weights_RN: torch.Tensor, stats_RK: torch.Tensor, sampled: SampledLogits
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the sampled tokens: student, target, student at the sampling temperature."""
    weights_RN = weights_RN.double()
    student_R = sampled.student_R / asked.temperature - stats_RK[:, S_MAX] - stats_RK[:, S_SUM].log()
    # A teacher without weight may hold anything.
    teachers_RN = (sampled.teachers_RN / asked.temperature).masked_fill(weights_RN == 0, 0.0)
    if asked.has_target:
        target_R = (weights_RN * teachers_RN).sum(-1) - stats_RK[:, T_MAX] - stats_RK[:, T_SUM].log()
    else:
        shares_RN = teachers_RN - _log_normalisers(asked, stats_RK) + weights_RN.log()
        target_R = shares_RN.masked_fill(weights_RN == 0, -math.inf).logsumexp(-1)
    sampler_R = student_R
    if asked.sampler_ratio:
        assert asked.sampling_temperature is not None
        max_R = stats_RK[:, S_MAX] * asked.sampler_ratio
        sampler_R = sampled.student_R / asked.sampling_temperature - max_R - stats_RK[:, -1].log()
    return student_R, target_R, sampler_R
