"""Triton kernels on rows of logits: statistics, sums, gradient; what they compute is said in `layout.py`.

A program takes one row (statistics, sums) or one block of a row (gradient). Arithmetic is in float32. Differences
D = t - a are rounded alike in statistics and gradient, and used relative to their mean under q, so that the gradient of
a nearly certain student is not lost in rounding. The width is a compile-time constant: a model has one.

Comparisons that mask a block are made on blocks, also where a scalar would do: Triton's interpreter needs that.
Shapes: N teachers, K statistics, C constants of a row (those of `triton_rows`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row_of(index, HAS_INDEX: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if HAS_INDEX:
        return tl.load(index + row)
    return row


@triton.jit
def _mean_logits(teachers, strides, weights, at, columns, real, N: tl.constexpr):
    """Σ w_n z_n of a block; a teacher without weight is not read."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros(columns.shape, tl.float32)
    for n in tl.static_range(N):
        w = tl.load(weights + row * N + n) + tl.zeros(columns.shape, tl.float32)
        z = tl.load(teachers[n] + at * strides[n] + columns, real & (w != 0), other=0.0).to(tl.float32)
        total += w * z
    return total


@triton.jit
def _log_average(teachers, strides, constants, at, columns, real, inv_t, N: tl.constexpr, FIRST: tl.constexpr):
    """log Σ w_n softmax(z_n / τ) of a block. `constants`: by teacher its maximum and log w_n - log of its sum."""
    most = tl.full(columns.shape, -1e30, tl.float32)
    total = tl.zeros(columns.shape, tl.float32)
    for n in tl.static_range(N):
        peak = tl.load(constants + FIRST + 2 * n)
        share = tl.load(constants + FIRST + 2 * n + 1) + tl.zeros(columns.shape, tl.float32)
        asked = share > -1e29
        z = tl.load(teachers[n] + at * strides[n] + columns, real & asked, other=0.0).to(tl.float32)
        x = tl.where(asked, (z * inv_t - peak) + share, -1e30)
        high = tl.maximum(most, x)
        total = total * tl.exp(most - high) + tl.exp(x - high)
        most = high
    return most + tl.log(total)


@triton.jit
def stats_kernel(
    student, stride, teachers, strides, index, weights, out, inv_t, ratio,
    WIDTH: tl.constexpr, N: tl.constexpr, TARGET: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
    FIRST: tl.constexpr, SAMPLER: tl.constexpr, HAS_INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """COLUMNS: of a teacher by itself, 0 without; FIRST: the first of them."""
    row = tl.program_id(0).to(tl.int64)
    at = _row_of(index, HAS_INDEX)
    s_max, s_sum, t_max, t_sum = -1e30, 0.0, -1e30, 0.0
    gap_s, gap_t, ref, sampler = 0.0, 0.0, 0.0, 0.0
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        real = columns < WIDTH
        a = tl.load(student + at * stride + columns, real, other=0.0).to(tl.float32) * inv_t
        block_max = tl.max(tl.where(real, a, -float("inf")), 0)
        new_max = tl.maximum(s_max, block_max)
        factor = tl.exp(s_max - new_max)
        e = tl.where(real, tl.exp(a - new_max), 0.0)
        if TARGET:
            t = _mean_logits(teachers, strides, weights, at, columns, real, N) * inv_t
            gap = t - a
            at_peak = tl.max(tl.where(real & (a == block_max), gap, -float("inf")), 0)
            new_ref = tl.where(block_max > s_max, at_peak, ref)
            gap_s += s_sum * (new_ref - ref)
            gap_t -= t_sum * (new_ref - ref)
            ref = new_ref
            new_t_max = tl.maximum(t_max, tl.max(tl.where(real, t, -float("inf")), 0))
            t_factor = tl.exp(t_max - new_t_max)
            p = tl.where(real, tl.exp(t - new_t_max), 0.0)
            gap = tl.where(real, gap - ref, 0.0)
            gap_s = gap_s * factor - tl.sum(e * gap, 0)
            gap_t = gap_t * t_factor + tl.sum(p * gap, 0)
            t_sum = t_sum * t_factor + tl.sum(p, 0)
            t_max = new_t_max
        if SAMPLER:
            again = tl.where(real, tl.exp((a - new_max) * ratio), 0.0)
            sampler = sampler * tl.exp((s_max - new_max) * ratio) + tl.sum(again, 0)
        s_sum = s_sum * factor + tl.sum(e, 0)
        s_max = new_max
    out += row * K
    tl.store(out, s_max)
    tl.store(out + 1, s_sum)
    if TARGET:
        apart = t_max.to(tl.float64) - s_max.to(tl.float64) - ref.to(tl.float64)
        tl.store(out + 2, t_max)
        tl.store(out + 3, t_sum)
        tl.store(out + 4, gap_s.to(tl.float64) + s_sum.to(tl.float64) * apart)
        tl.store(out + 5, gap_t.to(tl.float64) - t_sum.to(tl.float64) * apart)
    if COLUMNS > 0:
        for n in tl.static_range(N):
            own = out + FIRST + COLUMNS * n
            w = tl.load(weights + row * N + n)
            _teacher(student + at * stride, teachers[n] + at * strides[n], own, w, s_max, inv_t, WIDTH, COLUMNS, BLOCK)
    if SAMPLER:
        tl.store(out + K - 1, sampler)


@triton.jit
def _teacher(student, teacher, out, w, s_max, inv_t, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """One teacher's maximum, sum, and with three columns its gap to the student; nothing where its weight is 0."""
    t_max, t_sum, gap_s, s_sum = -1e30, 0.0, 0.0, 0.0
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        real = (columns < WIDTH) & (w + tl.zeros(columns.shape, tl.float32) != 0)
        t = tl.load(teacher + columns, real, other=0.0).to(tl.float32) * inv_t
        new_max = tl.maximum(t_max, tl.max(tl.where(real, t, -float("inf")), 0))
        t_sum = t_sum * tl.exp(t_max - new_max) + tl.sum(tl.where(real, tl.exp(t - new_max), 0.0), 0)
        if COLUMNS > 2:
            a = tl.load(student + columns, real, other=0.0).to(tl.float32) * inv_t
            e = tl.where(real, tl.exp(a - s_max), 0.0)
            gap_s += tl.sum(e * tl.where(real, a - t, 0.0), 0)
            s_sum += tl.sum(e, 0)
        t_max = new_max
    tl.store(out, t_max)
    tl.store(out + 1, t_sum)
    if COLUMNS > 2:
        apart = t_max.to(tl.float64) - s_max.to(tl.float64)
        tl.store(out + 2, gap_s.to(tl.float64) + s_sum.to(tl.float64) * apart)


@triton.jit
def _compare(
    student, stride, teachers, strides, weights, constants, at, columns, real, inv_t, beta,
    N: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """(q, p, log p - log q - reference) of a block. `constants` are those of `TritonRows._constants`."""
    a = tl.load(student + at * stride + columns, real, other=0.0).to(tl.float32) * inv_t
    q = tl.where(real, tl.exp(a - tl.load(constants)) * tl.load(constants + 1), 0.0)
    if TARGET:
        t = _mean_logits(teachers, strides, weights, at, columns, real, N) * inv_t
        p = tl.where(real, tl.exp(t - tl.load(constants + 2)) * tl.load(constants + 3), 0.0)
        gap = (t - a) - tl.load(constants + 4)
    else:
        logp = _log_average(teachers, strides, constants, at, columns, real, inv_t, N, 8)
        p = tl.where(real, tl.exp(logp), 0.0)
        gap = (logp - (a - tl.load(constants))) - tl.load(constants + 4)
    return q, p, tl.where(real, gap, 0.0)


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
    student, stride, teachers, strides, index, weights, constants, out, inv_t, beta,
    WIDTH: tl.constexpr, N: tl.constexpr, TARGET: tl.constexpr, KIND: tl.constexpr, C: tl.constexpr,
    HAS_INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ of what the loss needs, relative to references; then the masses of q and p, which take them back in."""
    row = tl.program_id(0).to(tl.int64)
    at = _row_of(index, HAS_INDEX)
    constants += row * C
    first, second, reverse, mass_q, mass_p = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        real = columns < WIDTH
        q, p, gap = _compare(
            student, stride, teachers, strides, weights, constants, at, columns, real, inv_t, beta, N, TARGET
        )
        if KIND == 2:
            over, ratio = _over_mixture(q, p, constants, beta)
            first += tl.sum(tl.where(real, q * over, 0.0), 0)
            second += tl.sum(tl.where(real, p * tl.where(ratio < 1e9, over + gap, tl.load(constants + 7)), 0.0), 0)
        else:
            first += tl.sum(p * gap, 0)
        reverse -= tl.sum(q * gap, 0)
        mass_q += tl.sum(q, 0)
        mass_p += tl.sum(p, 0)
    out += row * 5
    tl.store(out, first)
    tl.store(out + 1, second)
    tl.store(out + 2, reverse)
    tl.store(out + 3, mass_q)
    tl.store(out + 4, mass_p)


@triton.jit
def gradient_kernel(
    student, stride, teachers, strides, index, weights, constants, centers_scales, inv_t, beta, columns_of_student,
    WIDTH: tl.constexpr, N: tl.constexpr, TARGET: tl.constexpr, KIND: tl.constexpr, C: tl.constexpr,
    HAS_INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a row's gradient over the student's logits; 0 in the padding."""
    row = tl.program_id(0).to(tl.int64)
    at = _row_of(index, HAS_INDEX)
    constants += row * C
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = columns < WIDTH
    center = tl.load(centers_scales + row * 2)
    scale = tl.load(centers_scales + row * 2 + 1)
    q, p, gap = _compare(
        student, stride, teachers, strides, weights, constants, at, columns, real, inv_t, beta, N, TARGET
    )
    if KIND == 0:
        g = q - p
    elif KIND == 1:
        g = q * (-gap - center)
    else:
        over, _ = _over_mixture(q, p, constants, beta)
        g = (1 - beta) * q * (over - center)
    g = tl.where(real, g * scale, 0.0)
    tl.store(student + at * stride + columns, g.to(student.dtype.element_ty), columns < columns_of_student)


@triton.jit
def scale_kernel(x, stride, factor, columns_of_x, BY_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """x times a factor, in place; not even read where that is 1."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.load(factor + row if BY_ROW else factor)
    if f != 1:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        here = x + row * stride + columns
        value = tl.load(here, columns < columns_of_x, other=0.0).to(tl.float32) * f
        tl.store(here, value.to(x.dtype.element_ty), columns < columns_of_x)
