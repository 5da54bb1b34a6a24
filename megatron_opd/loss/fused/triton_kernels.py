"""The Triton kernels behind the statistics: sums, gradient, and a gradient times a factor.

Arithmetic is in float32. Exponentials are relative to their row's maximum and not yet divided by their sum, which is
one factor a row. Differences log2 p - log2 q are rounded as in `triton_stats.py`, and taken relative to a reference,
their mean under q, so that the gradient of a nearly certain student is not lost in rounding. `constants` of a row are
those of `triton_rows.py`. The width is a compile-time constant: a model has one.

Comparisons that mask a tile are made on tiles, also where a scalar would do: Triton's interpreter needs that.
Shapes: N teachers, C constants of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_opd.loss.fused import triton_tiles as tiles

FIXED = tl.constexpr(7)
"""Constants of a row before those of its teachers."""
FARTHEST = tl.constexpr(126.0)
"""Differences of log2 p and log2 q are like this one where they are larger."""


@triton.jit
def _log_average(teachers, constants, columns, real, to_2, N: tl.constexpr, MASKED: tl.constexpr):
    """log2 Σ w_n softmax(z_n / τ) of a tile. `constants`: by teacher its maximum and log2(w_n / its sum)."""
    most, found = tl.full(columns.shape, -1e30, tl.float32), ()
    for n in tl.static_range(N):
        peak, share = constants[FIXED + 2 * n], constants[FIXED + 2 * n + 1]
        z = tiles.load_asked(teachers[n], tl.where(share > -1e29, 1.0, 0.0), columns, real, N, MASKED)
        found += (tl.fma(z - peak, to_2, share),)
        most = tl.maximum(most, found[n])
    total = tl.zeros(columns.shape, tl.float32)
    for n in tl.static_range(N):
        total += tiles.exp2(found[n] - most)
    return most + tiles.log2(total)


@triton.jit
def _compare(
    student, teachers, weights, constants, columns, real, to_2,
    N: tl.constexpr, TARGET: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(q times its sum, p times its sum, log2 p - log2 q - reference) of a tile."""
    a = tiles.load(student, columns, real, MASKED)
    u = (a - constants[0]) * to_2
    if TARGET:
        t = tiles.mean_logits(teachers, weights, columns, real, N, MASKED)
        v = (t - constants[2]) * to_2
        gap = ((t - a) - constants[4]) * to_2
    else:
        v = _log_average(teachers, constants, columns, real, to_2, N, MASKED)
        gap = (v - u) - constants[4]
    q, p = tiles.exp2(u), tiles.exp2(v)
    if MASKED:
        q, p, gap = tl.where(real, q, 0.0), tl.where(real, p, 0.0), tl.where(real, gap, 0.0)
    return q, p, gap


@triton.jit
def _over_mixture(gap, c, rest):
    """log2 q - log2 m, relative to its value at the reference: -log2(1 + c (2^gap - 1)), where c is p's share of m at
    the reference, and `rest` q's. Where 2^gap or the logarithm's argument is nearly 1, its distance to 1 has
    few bits, and a series takes its place."""
    power = tiles.exp2(tl.minimum(gap, FARTHEST))
    series = tl.fma(gap, tl.fma(gap, tl.fma(gap, 1.3333558e-3, 9.6181291e-3), 5.5504109e-2), 2.4022651e-1)  # ln(2)^k/k!
    y = c * tl.where(tl.abs(gap) < 0.25, gap * tl.fma(gap, series, 6.9314718e-1), power - 1)
    series = tl.fma(y, tl.fma(y, tl.fma(y, -2.8853901e-1, 3.6067376e-1), -4.8089835e-1), 7.2134752e-1)  # 1/(k ln(2))
    small = y * tl.fma(y, series, -1.4426950)
    return tl.where(tl.abs(y) < 0.0625, small, -tiles.log2(tl.fma(power, c, rest)))


@triton.jit(do_not_specialize=["lead"])
def sums_kernel(
    student, stride, teachers, strides, index, weights, constants, out, lead, to_2,
    WIDTH: tl.constexpr, N: tl.constexpr, TARGET: tl.constexpr, KIND: tl.constexpr, C: tl.constexpr,
    HAS_INDEX: tl.constexpr, SHIFTED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Σ of what the loss needs, relative to references; then the masses of q and p, which take them back in."""
    student, teachers, weights, lead = tiles.rows_of(
        student, stride, teachers, strides, index, weights, lead, N, HAS_INDEX, SHIFTED
    )
    constants = tiles.numbers_of(constants, C)
    FULL: tl.constexpr = WIDTH // TILE * TILE
    HEAD: tl.constexpr = 1 if SHIFTED and FULL > 0 else 0
    STOP: tl.constexpr = WIDTH + 7 if SHIFTED else WIDTH
    zero = tl.zeros([1, LANES, 1], tl.float32)
    sums = zero, zero, zero, zero, zero
    for start in range(HEAD * TILE, FULL, TILE):
        columns = tiles.columns_of(start, TILE, LANES, VECTOR)
        q, p, gap = _compare(student, teachers, weights, constants, columns, True, to_2, N, TARGET, False)
        sums = _add_up(sums, q, p, gap, constants, TARGET, KIND)
    for i in range(-HEAD, (STOP - FULL + TILE - 1) // TILE):
        columns = tiles.ragged_of(i, FULL, HEAD, TILE, LANES, VECTOR)
        real = (columns >= lead) & (columns < WIDTH + lead)
        q, p, gap = _compare(student, teachers, weights, constants, columns, real, to_2, N, TARGET, True)
        sums = _add_up(sums, q, p, gap, constants, TARGET, KIND)
    out += tl.program_id(0).to(tl.int64) * 5
    one_q, one_p = constants[1].to(tl.float64), constants[3].to(tl.float64)
    tl.store(out, tiles.row_sum(sums[0]) * (one_p if KIND == 0 else one_q) * tiles.LN_2)
    tl.store(out + 1, tiles.row_sum(sums[1]) * one_p * tiles.LN_2)
    tl.store(out + 2, tiles.row_sum(sums[2]) * one_q * tiles.LN_2)
    tl.store(out + 3, tiles.row_sum(sums[3]) * one_q)
    tl.store(out + 4, tiles.row_sum(sums[4]) * one_p)


@triton.jit
def _add_up(sums, q, p, gap, constants, TARGET: tl.constexpr, KIND: tl.constexpr):
    """(first, second, reverse, mass of q, mass of p) by lane, with one more tile. `reverse` of a target is known."""
    first, second, reverse, mass_q, mass_p = sums
    if KIND == 0:
        first += tiles.lane_sum(p * gap)
    if KIND == 2:
        over = _over_mixture(gap, constants[5], constants[6])
        first += tiles.lane_sum(q * over)
        far = -tiles.log2(constants[5])  # log2 p - log2 m where q is nothing beside p, less than 2^-30
        limit = tl.minimum(tiles.log2(constants[6]) + far + 30, FARTHEST)
        second += tiles.lane_sum(p * tl.where(gap < limit, over + gap, far))
    if not TARGET:
        reverse -= tiles.lane_sum(q * gap)
    return first, second, reverse, mass_q + tiles.lane_sum(q), mass_p + tiles.lane_sum(p)


@triton.jit(do_not_specialize=["lead"])
def gradient_kernel(
    student, stride, teachers, strides, index, weights, constants, centers_scales, lead, to_2, columns_of_student,
    WIDTH: tl.constexpr, N: tl.constexpr, TARGET: tl.constexpr, KIND: tl.constexpr, C: tl.constexpr,
    HAS_INDEX: tl.constexpr, SHIFTED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """One of PARTS parts of a row's gradient over the student's logits; 0 in the padding."""
    student, teachers, weights, lead = tiles.rows_of(
        student, stride, teachers, strides, index, weights, lead, N, HAS_INDEX, SHIFTED
    )
    constants = tiles.numbers_of(constants, C)
    center, scale = tiles.numbers_of(centers_scales, 2)
    scale_q, scale_p = scale * constants[1], scale * constants[3]
    FULL: tl.constexpr = WIDTH // TILE * TILE
    HEAD: tl.constexpr = 1 if SHIFTED and FULL > 0 else 0
    part = tl.program_id(1)
    for start in range((HEAD + part) * TILE, FULL, PARTS * TILE):
        columns = tiles.columns_of(start, TILE, LANES, VECTOR)
        q, p, gap = _compare(student, teachers, weights, constants, columns, True, to_2, N, TARGET, False)
        g = _slope(q, p, gap, constants, center, scale_q, scale_p, KIND)
        tl.store(student + columns, g.to(student.dtype.element_ty))
    stop = columns_of_student + lead
    for i in range(part - HEAD, (stop - FULL + TILE - 1) // TILE, PARTS):
        columns = tiles.ragged_of(i, FULL, HEAD, TILE, LANES, VECTOR)
        real = (columns >= lead) & (columns < WIDTH + lead)
        q, p, gap = _compare(student, teachers, weights, constants, columns, real, to_2, N, TARGET, True)
        g = tl.where(real, _slope(q, p, gap, constants, center, scale_q, scale_p, KIND), 0.0)
        tl.store(student + columns, g.to(student.dtype.element_ty), (columns >= lead) & (columns < stop))


@triton.jit
def _slope(q, p, gap, constants, center, scale_q, scale_p, KIND: tl.constexpr):
    """The gradient of a tile. The scales make q and p sum to 1; but for kind 0 they bring powers of 2 back."""
    if KIND == 0:
        return tl.fma(q, scale_q, -(p * scale_p))
    if KIND == 1:
        return q * (-gap - center) * scale_q
    return q * (_over_mixture(gap, constants[5], constants[6]) - center) * scale_q


@triton.jit
def scale_kernel(x, stride, factor, columns_of_x, blocks, BY_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """x times a factor, in place, `blocks` programs a row; x is not even read where the factor is 1."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64)
    f = tl.load(factor + row if BY_ROW else factor)
    if f != 1:
        columns = block * BLOCK + tl.arange(0, BLOCK)
        here = x + row * stride + columns
        if (block + 1) * BLOCK <= columns_of_x:
            tl.store(here, (tl.load(here).to(tl.float32) * f).to(x.dtype.element_ty))
        else:
            value = tl.load(here, columns < columns_of_x, other=0.0).to(tl.float32) * f
            tl.store(here, value.to(x.dtype.element_ty), columns < columns_of_x)
