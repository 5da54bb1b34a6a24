"""The rows on CUDA by the kernels of `triton_kernels.py`; there is no [rows, columns] temporary.

Run with TRITON_INTERPRET=1 to test without a GPU.
Shape suffixes: R rows, T tokens, L columns, N teachers, K statistics, C constants.
"""

from __future__ import annotations

import math

import torch
import triton

from megatron_opd.loss.divergences import GKD
from megatron_opd.loss.fused import triton_kernels as kernels
from megatron_opd.loss.fused.backend import Wanted
from megatron_opd.loss.fused.reference import Reference
from megatron_opd.loss.fused.statistics import GAP_S, S_MAX, S_SUM, T_MAX, T_SUM, LogitRows, LossSpec, centers

_BLOCK = 4096
_WARPS = 8

_KINDS = {"forward": 0, "reverse": 1, "jsd": 2}
_FIXED = 8
"""Constants of a row before those of its teachers: the student's maximum and 1 / sum, the target's, the reference of
t - a; p / q and q / m at the reference; log p - log m where q is nothing."""


class TritonRows(Reference):
    """The Triton backend, for float32, bfloat16 and float16."""

    name = "triton"

    @staticmethod
    def supports(wanted: Wanted) -> bool:
        """As `Backend.supports`."""
        return wanted.dtypes <= {torch.float32, torch.bfloat16, torch.float16} and wanted.spec.divergence == GKD

    def whole(
        self, rows: LogitRows, asked: LossSpec, scale_R: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `Reference.whole`."""
        stats_RK = self.stats(rows, asked)
        sums_R3 = self.sums(rows, asked, stats_RK, is_whole=True) if asked.has_sums else None
        if scale_R is not None:
            self.gradient(rows, asked, stats_RK, (centers(stats_RK, sums_R3), scale_R))
        return stats_RK, sums_R3

    def stats(self, rows: LogitRows, asked: LossSpec) -> torch.Tensor:
        """As `Reference.stats`."""
        out_RK = torch.empty(rows.num_rows, asked.num_stats, dtype=torch.float64, device=rows.student_RL.device)
        kernels.stats_kernel[(rows.num_rows,)](
            *_common(rows), out_RK, 1 / asked.temperature, asked.sampler_ratio,
            WIDTH=rows.width, N=len(rows.teachers), TARGET=asked.has_target, K=asked.num_stats,
            COLUMNS=asked.teacher_columns if asked.has_teachers else 0, FIRST=asked.first_teacher,
            SAMPLER=asked.sampler_ratio > 0, HAS_INDEX=rows.index_R is not None, BLOCK=_block(rows), num_warps=_WARPS,
        )  # fmt: skip
        return out_RK

    def sums(self, rows: LogitRows, asked: LossSpec, stats_RK: torch.Tensor, is_whole: bool = False) -> torch.Tensor:
        """As `Reference.sums`; where the whole vocabulary is here, masses are 1 and not a sum in float32."""
        reference_R, constants_RC = _constants(rows, asked, stats_RK, None)
        out_R5 = torch.empty(rows.num_rows, 5, dtype=torch.float32, device=stats_RK.device)
        kernels.sums_kernel[(rows.num_rows,)](
            *_common(rows), constants_RC, out_R5, 1 / asked.temperature, asked.beta,
            WIDTH=rows.width, N=len(rows.teachers), TARGET=asked.has_target, KIND=_KINDS[asked.kind],
            C=constants_RC.shape[1], HAS_INDEX=rows.index_R is not None, BLOCK=_block(rows), num_warps=_WARPS,
        )  # fmt: skip
        first_R, second_R, reverse_R, mass_q_R, mass_p_R = out_R5.double().unbind(-1)
        if is_whole:
            mass_q_R = mass_p_R = torch.ones_like(first_R)
        reverse_R = reverse_R - mass_q_R * reference_R
        if asked.kind == "jsd":
            over_R = _over_at(reference_R, asked.beta)
            first_R = first_R + mass_q_R * over_R
            second_R = second_R + mass_p_R * (over_R + reference_R)
        else:
            first_R = first_R + mass_p_R * reference_R if asked.kind == "forward" else reverse_R
        return torch.stack([first_R, second_R, reverse_R], dim=-1)

    def gradient(
        self, rows: LogitRows, asked: LossSpec, stats_RK: torch.Tensor, center_scale: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """As `Reference.gradient`."""
        center_R, scale_R = center_scale
        reference_R, constants_RC = _constants(rows, asked, stats_RK, center_R)
        at_reference_R = _over_at(reference_R, asked.beta) if asked.kind == "jsd" else -reference_R
        center_R = center_R - at_reference_R
        centers_scales_R2 = torch.stack([center_R, scale_R / asked.temperature], dim=-1).float().contiguous()
        block, columns = _block(rows), rows.student_RL.shape[1]
        kernels.gradient_kernel[(rows.num_rows, triton.cdiv(columns, block))](
            *_common(rows), constants_RC, centers_scales_R2, 1 / asked.temperature, asked.beta, columns,
            WIDTH=rows.width, N=len(rows.teachers), TARGET=asked.has_target, KIND=_KINDS[asked.kind],
            C=constants_RC.shape[1], HAS_INDEX=rows.index_R is not None, BLOCK=block, num_warps=_WARPS,
        )  # fmt: skip

    def scale(self, grad_TL: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """As `Reference.scale`, without asking the device."""
        if grad_TL.dtype == torch.float64:
            return super().scale(grad_TL, factor)
        block = min(_BLOCK, triton.next_power_of_2(grad_TL.shape[1]))
        kernels.scale_kernel[(grad_TL.shape[0], triton.cdiv(grad_TL.shape[1], block))](
            grad_TL, grad_TL.stride(0), factor.float().contiguous(), grad_TL.shape[1],
            BY_ROW=factor.dim() > 0, BLOCK=block, num_warps=_WARPS,
        )  # fmt: skip
        return grad_TL


def _common(rows: LogitRows) -> tuple[object, ...]:
    """The arguments that all kernels on rows begin with."""
    index_R = rows.weights_RN if rows.index_R is None else rows.index_R  # not read where there is none
    strides = tuple(t.stride(0) for t in rows.teachers)
    return rows.student_RL, rows.student_RL.stride(0), tuple(rows.teachers), strides, index_R, rows.weights_RN


def _block(rows: LogitRows) -> int:
    return min(_BLOCK, triton.next_power_of_2(max(rows.width, 16)))


def _constants(
    rows: LogitRows, asked: LossSpec, stats_RK: torch.Tensor, center_R: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A reference for log p - log q by row (float64), and what the kernels need of each row (float32)."""
    log_s_R = stats_RK[:, S_SUM].log()
    zero_R = torch.zeros_like(log_s_R)
    teachers: list[torch.Tensor] = []
    t_max_R = over_t_R = zero_R
    if asked.has_target:
        t_max_R, over_t_R = stats_RK[:, T_MAX], 1 / stats_RK[:, T_SUM]
        mean_R = t_max_R - stats_RK[:, S_MAX] - stats_RK[:, GAP_S] / stats_RK[:, S_SUM]  # of t - a under q
        gap_R = mean_R.float().double()
        reference_R = gap_R - t_max_R - stats_RK[:, T_SUM].log() + stats_RK[:, S_MAX] + log_s_R
    else:
        # The mean of log p - log q under q, where it is known; with JSD nearly that.
        reference_R = zero_R if center_R is None or asked.kind != "reverse" else -center_R
        if asked.kind == "jsd":
            gaps_RN = stats_RK[:, [at.gap_s for at in asked.teachers]] / stats_RK[:, S_SUM, None]
            apart_RN = gaps_RN + stats_RK[:, [at.sum for at in asked.teachers]].log()
            shares_RN = rows.weights_RN.double().log() - apart_RN
            reference_R = log_s_R + shares_RN.masked_fill(rows.weights_RN == 0, -math.inf).logsumexp(-1)
        gap_R = (reference_R - log_s_R).float().double()
        reference_R = gap_R + log_s_R
        weights_RN = rows.weights_RN.double()
        for at, w_R in zip(asked.teachers, weights_RN.unbind(-1), strict=True):
            teachers += [stats_RK[:, at.max], (w_R.log() - stats_RK[:, at.sum].log()).masked_fill(w_R == 0, -1e30)]
    over_R = _over_at(reference_R, asked.beta)
    far_R = -math.log(asked.beta) - over_R - reference_R if asked.kind == "jsd" else zero_R
    fixed = [
        stats_RK[:, S_MAX],
        1 / stats_RK[:, S_SUM],
        t_max_R,
        over_t_R,
        gap_R,
        reference_R.exp(),
        over_R.exp(),
        far_R,
    ]
    return reference_R, torch.stack([*fixed, *teachers], dim=-1).float().contiguous()


def _over_at(reference_R: torch.Tensor, beta: float) -> torch.Tensor:
    """log q - log m where log p - log q is the reference."""
    return -torch.log((1 - beta) + beta * reference_R.exp())
