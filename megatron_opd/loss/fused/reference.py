"""The rows' statistics, sums and gradient in plain PyTorch: the formulas, for any device and floating-point type.

Arithmetic is in float64, a few rows at a time, so that what is made on the way stays small. The other backends do the
same in fewer looks at the memory, and in float32; `statistics.py` says what the columns of statistics and sums are.

Shape suffixes: R rows, C rows of a part, L local columns, N teachers, K statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from megatron_opd.loss.divergences import GKD
from megatron_opd.loss.fused.backend import Wanted
from megatron_opd.loss.fused.passes import Pass, PassInputs
from megatron_opd.loss.fused.statistics import NOTHING, S_MAX, S_SUM, T_MAX, T_SUM, LogitRows, LossSpec, centers

_VALUES_AT_A_TIME = 1 << 18


class Reference:
    """The plain backend."""

    name = "torch"

    @staticmethod
    def supports(wanted: Wanted) -> bool:
        """As `Backend.supports`."""
        return wanted.spec.divergence == GKD

    def begin(self, inputs: PassInputs) -> Pass:
        """A pass over rows, not yet started."""
        return Pass(inputs, self)

    def whole(
        self, rows: LogitRows, asked: LossSpec, scale_R: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Statistics and sums of an unsharded vocabulary, and with `scale_R` the gradient times it."""
        stats_RK = self.stats(rows, asked)
        sums_R3 = self.sums(rows, asked, stats_RK) if asked.has_sums else None
        if scale_R is not None:
            self.gradient(rows, asked, stats_RK, (centers(stats_RK, sums_R3), scale_R))
        return stats_RK, sums_R3

    def stats(self, rows: LogitRows, asked: LossSpec) -> torch.Tensor:
        """This shard's statistics [R, K], float64."""
        if rows.width == 0:
            return _of_no_columns(rows, asked)
        return torch.cat([_stats(part, asked) for _, part in _parts(rows)])

    def sums(self, rows: LogitRows, asked: LossSpec, stats_RK: torch.Tensor) -> torch.Tensor:
        """This shard's share of the sums [R, 3], float64, given the statistics of all shards together."""
        return torch.cat([_sums(part, asked, stats_RK[at]) for at, part in _parts(rows)])

    def gradient(
        self, rows: LogitRows, asked: LossSpec, stats_RK: torch.Tensor, center_scale: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Overwrite the student's rows by d loss / d logits. Given, by row: what `centers` says, and a factor."""
        center_R, scale_R = center_scale
        for at, part in _parts(rows):
            logq_CL, logp_CL = _logq(part, asked, stats_RK[at]), _logp(part, asked, stats_RK[at])
            q_CL, center_C1 = logq_CL.exp(), center_R[at, None]
            if asked.kind == "forward":
                grad_CL = q_CL - logp_CL.exp()
            elif asked.kind == "reverse":
                grad_CL = q_CL * (logq_CL - logp_CL - center_C1)
            else:
                grad_CL = (1 - asked.beta) * q_CL * (logq_CL - _mixture(logq_CL, logp_CL, asked.beta) - center_C1)
            part.replace_student(grad_CL * (scale_R[at, None] / asked.temperature))

    def scale(self, grad_TL: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """`grad_TL` times a number, or one a row, in place."""
        if grad_TL.device.type == "cpu" and bool((factor == 1).all()):
            return grad_TL
        return grad_TL.mul_(factor if factor.dim() == 0 else factor[:, None])


def _stats(rows: LogitRows, asked: LossSpec) -> torch.Tensor:
    a_CL = _scaled(rows, rows.student_RL, asked)
    u_CL = a_CL - a_CL.amax(-1, keepdim=True)
    q_CL = u_CL.exp()
    columns = [a_CL.amax(-1), q_CL.sum(-1)]
    if asked.has_target:
        t_CL = _mean_logits(rows, asked)
        v_CL = t_CL - t_CL.amax(-1, keepdim=True)
        p_CL = v_CL.exp()
        columns += [t_CL.amax(-1), p_CL.sum(-1), (q_CL * (u_CL - v_CL)).sum(-1), (p_CL * (v_CL - u_CL)).sum(-1)]
    if asked.has_teachers:
        for n, teacher in enumerate(rows.teachers):
            t_CL = _scaled(rows, teacher, asked)
            v_CL = t_CL - t_CL.amax(-1, keepdim=True)
            own = [t_CL.amax(-1), v_CL.exp().sum(-1), (q_CL * (u_CL - v_CL)).sum(-1)][: asked.teacher_columns]
            not_asked_C = rows.weights_RN[:, n] == 0
            columns += [x.masked_fill(not_asked_C, no) for x, no in zip(own, (NOTHING, 0, 0), strict=False)]
    if asked.sampler_ratio:
        columns.append((u_CL * asked.sampler_ratio).exp().sum(-1))
    return torch.stack(columns, dim=-1)


def _sums(rows: LogitRows, asked: LossSpec, stats_CK: torch.Tensor) -> torch.Tensor:
    logq_CL, logp_CL = _logq(rows, asked, stats_CK), _logp(rows, asked, stats_CK)
    q_CL, p_CL = logq_CL.exp(), logp_CL.exp()
    reverse_C = (q_CL * (logq_CL - logp_CL)).sum(-1)
    if asked.kind == "jsd":
        logm_CL = _mixture(logq_CL, logp_CL, asked.beta)
        sums = [(q_CL * (logq_CL - logm_CL)).sum(-1), (p_CL * (logp_CL - logm_CL)).sum(-1), reverse_C]
    elif asked.kind == "forward":
        sums = [(p_CL * (logp_CL - logq_CL)).sum(-1), torch.zeros_like(reverse_C), reverse_C]
    else:
        sums = [reverse_C, torch.zeros_like(reverse_C), reverse_C]
    return torch.stack(sums, dim=-1)


def _of_no_columns(rows: LogitRows, asked: LossSpec) -> torch.Tensor:
    stats_RK = torch.zeros(rows.num_rows, asked.num_stats, dtype=torch.float64, device=rows.student_RL.device)
    stats_RK[:, [S_MAX, *(at.max for at in asked.targets)]] = NOTHING
    return stats_RK


def _parts(rows: LogitRows) -> Iterator[tuple[slice, LogitRows]]:
    size = max(_VALUES_AT_A_TIME // max(rows.width, 1), 1)
    for start in range(0, rows.num_rows, size):
        yield slice(start, start + size), rows.part(start, start + size)


def _scaled(rows: LogitRows, logits: torch.Tensor, asked: LossSpec) -> torch.Tensor:
    """Chosen rows and real columns of logits / τ, [C, L]."""
    return rows.chosen(logits).double() / asked.temperature


def _mean_logits(rows: LogitRows, asked: LossSpec) -> torch.Tensor:
    """Σ w_n z_n / τ; whatever a teacher without weight holds, it has no influence."""
    total_CL = torch.zeros((), dtype=torch.float64, device=rows.student_RL.device)
    for w_C, teacher in zip(rows.weights_RN.double().unbind(-1), rows.teachers, strict=True):
        weighted_CL = w_C[:, None] * _scaled(rows, teacher, asked)
        total_CL = total_CL + weighted_CL.masked_fill((w_C == 0)[:, None], 0.0)
    return total_CL


def _logq(rows: LogitRows, asked: LossSpec, stats_CK: torch.Tensor) -> torch.Tensor:
    return _scaled(rows, rows.student_RL, asked) - (stats_CK[:, S_MAX] + stats_CK[:, S_SUM].log())[:, None]


def _logp(rows: LogitRows, asked: LossSpec, stats_CK: torch.Tensor) -> torch.Tensor:
    if asked.has_target:
        return _mean_logits(rows, asked) - (stats_CK[:, T_MAX] + stats_CK[:, T_SUM].log())[:, None]
    shares = []
    for at, teacher, w_C in zip(asked.teachers, rows.teachers, rows.weights_RN.double().unbind(-1), strict=True):
        max_C, sum_C = stats_CK[:, at.max], stats_CK[:, at.sum]
        share_CL = _scaled(rows, teacher, asked) - (max_C + sum_C.log() - w_C.log())[:, None]
        shares.append(share_CL.masked_fill((w_C == 0)[:, None], NOTHING))
    return torch.logsumexp(torch.stack(shares), dim=0)


def _mixture(logq_CL: torch.Tensor, logp_CL: torch.Tensor, beta: float) -> torch.Tensor:
    """log m of m = βp + (1-β)q."""
    return torch.logaddexp(logp_CL + math.log(beta), logq_CL + math.log1p(-beta))
