"""The Triton kernels behind the statistics: sums, gradient, and a gradient times a factor.

Arithmetic is in float32. Differences D = t - a are rounded as in `triton_stats.py`, and used relative to their mean
under q, so that the gradient of a nearly certain student is not lost in rounding. `constants` of a row are those of
`triton_rows.py`. The width is a compile-time constant: a model has one.

Comparisons that mask a tile are made on tiles, also where a scalar would do: Triton's interpreter needs that.
Shapes: N teachers, C constants of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_opd.loss.fused import triton_tiles as tiles


@triton.jit
def _log_average(teachers, constants, columns, real, to_2, N: tl.constexpr, FIRST: tl.constexpr, MASKED: tl.constexpr):
    """log2 Σ w_n softmax(z_n / τ) of a tile. `constants`: by teacher its maximum and log2(w_n / its sum)."""
    most = tl.full(columns.shape, -1e30, tl.float32)
    total = tl.zeros(columns.shape, tl.float32)
    for n in tl.static_range(N):
        peak, share = tl.load(constants + FIRST + 2 * n), tl.load(constants + FIRST + 2 * n + 1)
        z = tiles.load_asked(teachers[n], tl.where(share > -1e29, 1.0, 0.0), columns, real, N, MASKED)
        x = tl.fma(z - peak, tl.zeros(columns.shape, tl.float32) + to_2, tl.zeros(columns.shape, tl.float32) + share)
        smaller = tiles.exp2(-tl.abs(x - most))
        total = tl.where(x > most, tl.fma(total, smaller, 1.0), total + smaller)
        most = tl.maximum(most, x)
    return most + tiles.log2(total)


@triton.jit
def _compare(
    student, teachers, weights, constants, columns, real, inv_t, to_2,
    N: tl.constexpr, TARGET: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(q, p, log p - log q - reference) of a tile."""
    a = tiles.load(student, columns, real, MASKED)
    a_max = tl.load(constants)
    q = tiles.exp2((a - a_max) * to_2) * tl.load(constants + 1)
    if TARGET:
        t = tiles.mean_logits(teachers, weights, columns, real, N, MASKED)
        p = tiles.exp2((t - tl.load(constants + 2)) * to_2) * tl.load(constants + 3)
        gap = ((t - a) - tl.load(constants + 4)) * inv_t
    else:
        logp = _log_average(teachers, constants, columns, real, to_2, N, 8, MASKED)
        p = tiles.exp2(logp)
        gap = (logp * tiles.LN_2 - (a - a_max) * inv_t) - tl.load(constants + 4)
    if MASKED:
        q, p, gap = tl.where(real, q, 0.0), tl.where(real, p, 0.0), tl.where(real, gap, 0.0)
    return q, p, gap


@triton.jit
def _over_mixture(q, p, constants, beta):
    """log q - log m, relative to its value at the reference; and p / q."""
    ratio = tl.minimum(p / (q + 1.17549435e-38), 1e30)
    scale = tl.load(constants + 6)
    w = (1 - beta + beta * ratio) * scale
    e = w - 1
    exact = beta * scale * (ratio - tl.load(constants + 5))
    lost = tl.where(tl.abs(exact) < 0.5, (exact - e) * (1 - e + e * e), 0.0)
    return -(tl.log(w) + lost), ratio


@triton.jit
def sums_kernel(
    student, stride, teachers, strides, index, weights, constants, out, lead, inv_t, to_2, beta,
    WIDTH: tl.constexpr, N: tl.constexpr, TARGET: tl.constexpr, KIND: tl.constexpr, C: tl.constexpr,
    HAS_INDEX: tl.constexpr, SHIFTED: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Σ of what the loss needs, relative to references; then the masses of q and p, which take them back in."""
    at = tiles.row_of(index, HAS_INDEX)
    lead = tiles.lead_of(at, stride, lead, SHIFTED)
    student = tiles.begin(student, at, stride, lead, SHIFTED)
    teachers = tiles.begins(teachers, at, strides, lead, N, SHIFTED)
    weights = tiles.weights_of(weights, N)
    constants += tl.program_id(0).to(tl.int64) * C
    TILE: tl.constexpr = LANES * tiles.COLUMNS_OF_LANE
    FULL: tl.constexpr = WIDTH // TILE * TILE
    HEAD: tl.constexpr = 1 if SHIFTED and FULL > 0 else 0
    STOP: tl.constexpr = WIDTH + 7 if SHIFTED else WIDTH
    zero = tl.zeros([1, LANES, 1], tl.float32)
    sums = zero, zero, zero, zero, zero
    for start in range(HEAD * TILE, FULL, TILE):
        columns = tiles.columns_of(start, LANES, VECTOR)
        q, p, gap = _compare(
            student, teachers, weights, constants, columns, True, inv_t, to_2, N, TARGET, False
        )
        sums = _add_up(sums, q, p, gap, constants, beta, KIND)
    for i in range(-HEAD, (STOP - FULL + TILE - 1) // TILE):
        start = FULL + i * TILE if HEAD == 0 else tl.where(i < 0, 0, FULL + i * TILE)
        columns = tiles.columns_of(start, LANES, VECTOR)
        real = (columns >= lead) & (columns < WIDTH + lead)
        q, p, gap = _compare(student, teachers, weights, constants, columns, real, inv_t, to_2, N, TARGET, True)
        sums = _add_up(sums, q, p, gap, constants, beta, KIND)
    out += tl.program_id(0).to(tl.int64) * 5
    for k in tl.static_range(5):
        tl.store(out + k, tiles.row_sum(sums[k]))


@triton.jit
def _add_up(sums, q, p, gap, constants, beta, KIND: tl.constexpr):
    """(first, second, reverse, mass of q, mass of p) by lane, with one more tile."""
    first, second, reverse, mass_q, mass_p = sums
    if KIND == 2:
        over, ratio = _over_mixture(q, p, constants, beta)
        first += tiles.lane_sum(q * over)
        second += tiles.lane_sum(p * tl.where(ratio < 1e9, over + gap, tl.load(constants + 7)))
    else:
        first += tiles.lane_sum(p * gap)
    return first, second, reverse - tiles.lane_sum(q * gap), mass_q + tiles.lane_sum(q), mass_p + tiles.lane_sum(p)


@triton.jit
def gradient_kernel(
    student, stride, teachers, strides, index, weights, constants, centers_scales, lead, inv_t, to_2, beta,
    columns_of_student,
    WIDTH: tl.constexpr, N: tl.constexpr, TARGET: tl.constexpr, KIND: tl.constexpr, C: tl.constexpr,
    HAS_INDEX: tl.constexpr, SHIFTED: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One of PARTS parts of a row's gradient over the student's logits; 0 in the padding."""
    at = tiles.row_of(index, HAS_INDEX)
    lead = tiles.lead_of(at, stride, lead, SHIFTED)
    student = tiles.begin(student, at, stride, lead, SHIFTED)
    teachers = tiles.begins(teachers, at, strides, lead, N, SHIFTED)
    weights = tiles.weights_of(weights, N)
    row = tl.program_id(0).to(tl.int64)
    constants += row * C
    center, scale = tl.load(centers_scales + row * 2), tl.load(centers_scales + row * 2 + 1)
    TILE: tl.constexpr = LANES * tiles.COLUMNS_OF_LANE
    FULL: tl.constexpr = WIDTH // TILE * TILE
    HEAD: tl.constexpr = 1 if SHIFTED and FULL > 0 else 0
    part = tl.program_id(1)
    for start in range((HEAD + part) * TILE, FULL, PARTS * TILE):
        columns = tiles.columns_of(start, LANES, VECTOR)
        q, p, gap = _compare(student, teachers, weights, constants, columns, True, inv_t, to_2, N, TARGET, False)
        g = _slope(q, p, gap, constants, center, beta, KIND) * scale
        tl.store(student + columns, g.to(student.dtype.element_ty))
    stop = columns_of_student + lead
    for i in range(part - HEAD, (stop - FULL + TILE - 1) // TILE, PARTS):
        start = FULL + i * TILE if HEAD == 0 else tl.where(i < 0, 0, FULL + i * TILE)
        columns = tiles.columns_of(start, LANES, VECTOR)
        real = (columns >= lead) & (columns < WIDTH + lead)
        q, p, gap = _compare(student, teachers, weights, constants, columns, real, inv_t, to_2, N, TARGET, True)
        g = tl.where(real, _slope(q, p, gap, constants, center, beta, KIND) * scale, 0.0)
        tl.store(student + columns, g.to(student.dtype.element_ty), (columns >= lead) & (columns < stop))


@triton.jit
def _slope(q, p, gap, constants, center, beta, KIND: tl.constexpr):
    """The derivative of a tile by its logits / τ."""
    if KIND == 0:
        return q - p
    if KIND == 1:
        return q * (-gap - center)
    over, _ = _over_mixture(q, p, constants, beta)
    return (1 - beta) * q * (over - center)


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
