"""The rows on CUDA by Triton kernels (`triton_stats.py`, `triton_kernels.py`); there is no [rows, columns] temporary.

Kernels see logits as they are in memory, and differences of them; τ and the base of their powers come in as factors.

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
from megatron_opd.loss.fused.triton_stats import stats_kernel

_WARPS = 8
_LANES = 32 * _WARPS
_PARTS = 8
"""Programs that share a row of the gradient: chunks of few rows then fill a GPU too."""
_BLOCK = 4096
"""Values that one program scales."""
_TINY = 1e-37
"""The smallest share of a mixture, so that its logarithm is finite."""
_FARTHEST = 40.0
"""References of log p - log q in a mixture lie within this, so that float32 holds the shares. Beyond, the mixture is
one of the two."""
_OPTIONS = {"num_warps": _WARPS, "enable_fp_fusion": False}
"""Compiler options. Products are not contracted into sums: two kernels must round the same formula alike."""

_LN_2 = math.log(2)
_KINDS = {"forward": 0, "reverse": 1, "jsd": 2}


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
        to_2 = _to_2(asked)
        stats_kernel[(rows.num_rows,)](
            *_common(rows), out_RK, _lead(rows), to_2, to_2 * asked.sampler_ratio,
            TARGET=asked.has_target, COLUMNS=asked.teacher_columns if asked.has_teachers else 0, K=asked.num_stats,
            FIRST=asked.first_teacher, SAMPLER=asked.sampler_ratio > 0,
            **_shape(rows, 16 if len(rows.teachers) <= 2 else 8), **_OPTIONS,
        )  # fmt: skip
        if asked.temperature != 1:
            out_RK[:, _logits_among(asked)] /= asked.temperature
        return out_RK

    def sums(self, rows: LogitRows, asked: LossSpec, stats_RK: torch.Tensor, is_whole: bool = False) -> torch.Tensor:
        """As `Reference.sums`; where the whole vocabulary is here, masses are 1 and not a sum in float32."""
        reference_R, constants_RC = _constants(rows, asked, stats_RK, None)
        out_R5 = torch.empty(rows.num_rows, 5, dtype=torch.float64, device=stats_RK.device)
        kernels.sums_kernel[(rows.num_rows,)](
            *_common(rows), constants_RC, out_R5, _lead(rows), _to_2(asked),
            TARGET=asked.has_target, KIND=_KINDS[asked.kind], C=constants_RC.shape[1], **_shape(rows, 8), **_OPTIONS,
        )  # fmt: skip
        first_R, second_R, reverse_R, mass_q_R, mass_p_R = out_R5.unbind(-1)
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
        center_R = (center_R - at_reference_R) / _LN_2
        unit = {"forward": 1.0, "reverse": _LN_2, "jsd": _LN_2 * (1 - asked.beta)}[asked.kind]
        scale_R = scale_R * (unit / asked.temperature)
        centers_scales_R2 = torch.stack([center_R, scale_R], dim=-1).float().contiguous()
        kernels.gradient_kernel[(rows.num_rows, _PARTS)](
            *_common(rows), constants_RC, centers_scales_R2, _lead(rows), _to_2(asked), rows.student_RL.shape[1],
            TARGET=asked.has_target, KIND=_KINDS[asked.kind], C=constants_RC.shape[1], PARTS=_PARTS,
            **_shape(rows, 16 if len(rows.teachers) == 1 else 8), **_OPTIONS,
        )  # fmt: skip

    def scale(self, grad_TL: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """As `Reference.scale`, without asking the device."""
        if grad_TL.dtype == torch.float64:
            return super().scale(grad_TL, factor)
        is_one_row = factor.dim() == 0 and grad_TL.is_contiguous()
        rows, columns = (1, grad_TL.numel()) if is_one_row else grad_TL.shape
        block = min(_BLOCK, triton.next_power_of_2(columns))
        blocks = triton.cdiv(columns, block)
        kernels.scale_kernel[(rows * blocks,)](
            grad_TL, grad_TL.stride(0), factor.float().contiguous(), columns, blocks,
            BY_ROW=factor.dim() > 0, BLOCK=block, **_OPTIONS,
        )  # fmt: skip
        return grad_TL


def _common(rows: LogitRows) -> tuple[object, ...]:
    """The arguments that all kernels on rows begin with."""
    index_R = rows.weights_RN if rows.index_R is None else rows.index_R  # not read where there is none
    strides = tuple(t.stride(0) for t in rows.teachers)
    return rows.student_RL, rows.student_RL.stride(0), tuple(rows.teachers), strides, index_R, rows.weights_RN


def _shape(rows: LogitRows, columns: int) -> dict[str, int]:
    """The compile-time arguments that all kernels on rows have. `columns`: those of a tile that a lane has; fewer need
    fewer registers, and more instructions a column."""
    size = max(x.element_size() for x in (rows.student_RL, *rows.teachers))
    return {
        "WIDTH": rows.width, "N": len(rows.teachers), "HAS_INDEX": rows.index_R is not None,
        "SHIFTED": _is_shifted(rows),
        "TILE": _LANES * columns, "LANES": _LANES, "VECTOR": 16 // size,
    }  # fmt: skip


def _is_shifted(rows: LogitRows) -> bool:
    """Whether the kernels must find out where rows begin, to load 16 bytes at a time. Triton knows where they do if
    strides are multiples of 16."""
    its = _begin_alike(rows)
    return its is not None and (its != (0, 0) or any(x.stride(0) % 16 for x in (rows.student_RL, *rows.teachers)))


def _lead(rows: LogitRows) -> int:
    """Columns of the first row's first 16 bytes (32 in float32) that lie before the row, where rows are shifted."""
    return (_begin_alike(rows) or (0, 0))[0]


def _begin_alike(rows: LogitRows) -> tuple[int, int] | None:
    """Where all matrices' rows begin, modulo 8 values: (the first, from one to the next); None: they differ, and are
    loaded a value at a time."""
    found = {(x.data_ptr() // x.element_size() % 8, x.stride(0) % 8) for x in (rows.student_RL, *rows.teachers)}
    return found.pop() if len(found) == 1 else None


def _to_2(asked: LossSpec) -> float:
    """The factor of differences of logits in powers of 2."""
    return 1 / (_LN_2 * asked.temperature)


def _logits_among(asked: LossSpec) -> list[int]:
    """The columns of the statistics that are maxima and differences of logits."""
    its = [(at.max, at.gap_s, at.gap_t) for at in asked.targets]
    return [S_MAX, *(column for columns in its for column in columns if column is not None)]


def _constants(
    rows: LogitRows, asked: LossSpec, stats_RK: torch.Tensor, center_R: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A reference for log p - log q by row (float64), and what the kernels need of each row (float32): the student's
    maximum logit and 1 / sum; the target's; the reference of their difference, or with an average of probabilities of
    log2 p - log2 of the student's exponential; the share of p in the mixture at the reference, and of q; then by
    teacher of such an average its maximum logit and log2(weight / sum)."""
    tau = asked.temperature
    log_s_R = stats_RK[:, S_SUM].log()
    zero_R = torch.zeros_like(log_s_R)
    teachers: list[torch.Tensor] = []
    t_max_R, over_t_R = zero_R, torch.ones_like(zero_R)
    if asked.has_target:
        t_max_R, over_t_R = stats_RK[:, T_MAX], 1 / stats_RK[:, T_SUM]
        mean_R = t_max_R - stats_RK[:, S_MAX] - stats_RK[:, GAP_S] / stats_RK[:, S_SUM]  # of t - a under q
        base_R = stats_RK[:, S_MAX] + log_s_R - t_max_R - stats_RK[:, T_SUM].log()
        if asked.kind == "jsd":
            mean_R = (mean_R + base_R).clamp(-_FARTHEST, _FARTHEST) - base_R
        gap_R = (mean_R * tau).float().double()
        reference_R = gap_R / tau + base_R
    else:
        # The mean of log p - log q under q, where it is known; with JSD nearly that.
        reference_R = zero_R if center_R is None or asked.kind != "reverse" else -center_R
        if asked.kind == "jsd":
            gaps_RN = stats_RK[:, [at.gap_s for at in asked.teachers]] / stats_RK[:, S_SUM, None]
            apart_RN = gaps_RN + stats_RK[:, [at.sum for at in asked.teachers]].log()
            shares_RN = rows.weights_RN.double().log() - apart_RN
            reference_R = log_s_R + shares_RN.masked_fill(rows.weights_RN == 0, -math.inf).logsumexp(-1)
            reference_R = reference_R.clamp(-_FARTHEST, _FARTHEST)
        gap_R = ((reference_R - log_s_R) / _LN_2).float().double()
        reference_R = gap_R * _LN_2 + log_s_R
        weights_RN = rows.weights_RN.double()
        for at, w_R in zip(asked.teachers, weights_RN.unbind(-1), strict=True):
            share_R = w_R.log2() - stats_RK[:, at.sum].log2()
            teachers += [(stats_RK[:, at.max] * tau).masked_fill(w_R == 0, 0.0), share_R.masked_fill(w_R == 0, -1e30)]
    share_R = rest_R = zero_R
    if asked.kind == "jsd":
        odds_R = reference_R + math.log(asked.beta) - math.log1p(-asked.beta)
        share_R, rest_R = odds_R.sigmoid().clamp_min(_TINY), (-odds_R).sigmoid().clamp_min(_TINY)
    fixed = [stats_RK[:, S_MAX] * tau, 1 / stats_RK[:, S_SUM], t_max_R * tau, over_t_R, gap_R, share_R, rest_R]
    return reference_R, torch.stack([*fixed, *teachers], dim=-1).float().contiguous()


def _over_at(reference_R: torch.Tensor, beta: float) -> torch.Tensor:
    """log q - log m where log p - log q is the reference."""
    return -torch.log((1 - beta) + beta * reference_R.exp())
