"""The Triton kernel that makes the statistics of `statistics.py` in one look at every row of student and teachers.

A program takes a row. Each lane has a maximum of its own, and sums relative to it: nothing is put together before the
row's end. Logits are as they are in memory, not yet divided by τ: `to_2` (log2(e) / τ) brings differences into powers
of 2, and what leaves the kernel is multiplied by 1 / τ afterwards, in float64.

Differences D = t - a are summed relative to D at the lane's likeliest column, so that the gradient of a nearly certain
student, where that column has nearly all the mass, is not lost in rounding.

Shapes: N teachers, K statistics; a lane's state is [1, LANES, 1].
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_opd.loss.fused import triton_tiles as tiles

NOTHING = tl.constexpr(-1e30)


@triton.jit(do_not_specialize=["lead"])
def stats_kernel(
    student, stride, teachers, strides, index, weights, out, lead, to_2, sampler_to_2,
    WIDTH: tl.constexpr, N: tl.constexpr, TARGET: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
    FIRST: tl.constexpr, SAMPLER: tl.constexpr, HAS_INDEX: tl.constexpr, SHIFTED: tl.constexpr,
    TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """COLUMNS: of a teacher by itself, 0 without; FIRST: the first of them."""
    student, teachers, weights, lead = tiles.rows_of(
        student, stride, teachers, strides, index, weights, lead, N, HAS_INDEX, SHIFTED
    )
    FULL: tl.constexpr = WIDTH // TILE * TILE
    HEAD: tl.constexpr = 1 if SHIFTED and FULL > 0 else 0
    STOP: tl.constexpr = WIDTH + 7 if SHIFTED else WIDTH
    zero = tl.zeros([1, LANES, 1], tl.float32)
    own, target, each = (zero + NOTHING, zero, zero), (zero + NOTHING, zero, zero, zero, zero), ()
    for _ in tl.static_range(N if COLUMNS > 0 else 0):
        each += (zero + NOTHING, zero, zero)
    for start in range(HEAD * TILE, FULL, TILE):
        columns = tiles.columns_of(start, TILE, LANES, VECTOR)
        own, target, each = _step(
            own, target, each, student, teachers, weights, columns, True, to_2, sampler_to_2,
            N, TARGET, COLUMNS, SAMPLER, False,
        )  # fmt: skip
    for i in range(-HEAD, (STOP - FULL + TILE - 1) // TILE):
        columns = tiles.ragged_of(i, FULL, HEAD, TILE, LANES, VECTOR)
        real = (columns >= lead) & (columns < WIDTH + lead)
        own, target, each = _step(
            own, target, each, student, teachers, weights, columns, real, to_2, sampler_to_2,
            N, TARGET, COLUMNS, SAMPLER, True,
        )  # fmt: skip
    out += tl.program_id(0).to(tl.int64) * K
    s_max, factor, s_sum = _store_own(out, own, to_2)
    if TARGET:
        _store_target(out + 2, target, own, s_max, factor, s_sum, to_2)
    if COLUMNS > 0:
        for n in tl.static_range(N):
            its = each[3 * n], each[3 * n + 1], each[3 * n + 2]
            _store_teacher(out + FIRST + COLUMNS * n, its, weights[n], s_max, factor, s_sum, to_2, COLUMNS)
    if SAMPLER:
        tl.store(out + K - 1, tiles.row_sum(own[2] * tiles.exp2((own[0] - s_max) * sampler_to_2)))


@triton.jit
def _step(
    own, target, each, student, teachers, weights, columns, real, to_2, sampler_to_2,
    N: tl.constexpr, TARGET: tl.constexpr, COLUMNS: tl.constexpr, SAMPLER: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The states with one more tile: the student's, the target's, 3 numbers of each teacher."""
    s_max, s_sum, sampler = own
    a = _or_nothing(tiles.load(student, columns, real, MASKED), real, MASKED)
    peak = tiles.lane_max(a)
    new_max = tl.maximum(s_max, peak)
    factor = tiles.exp2((s_max - new_max) * to_2)
    e = tiles.exp2((a - new_max) * to_2)
    mean, found = 0.0, ()
    for n in tl.static_range(N):
        z = tiles.load_asked(teachers[n], weights[n], columns, real, N, MASKED)
        if TARGET:
            mean = tiles.add_weighted(mean, weights[n], z, n == 0, N)
        if COLUMNS > 0:
            its = each[3 * n], each[3 * n + 1], each[3 * n + 2]
            found += _with_teacher(its, a, e, factor, _or_nothing(z, real, MASKED), real, to_2, COLUMNS, MASKED)
    if TARGET:
        t = _or_nothing(mean, real, MASKED)
        target = _with_target(target, a, e, factor, t, real, s_max, s_sum, peak, to_2, MASKED)
    if SAMPLER:
        sampler = sampler * tiles.exp2((s_max - new_max) * sampler_to_2)
        sampler += tiles.lane_sum(tiles.exp2((a - new_max) * sampler_to_2))
    return (new_max, tl.fma(s_sum, factor, tiles.lane_sum(e)), sampler), target, found


@triton.jit
def _with_target(target, a, e, factor, t, real, s_max, s_sum, peak, to_2, MASKED: tl.constexpr):
    """(max t, Σ e^v, Σ e^u (D - ref), Σ e^v (D - ref), ref) with one more tile; ref is D at the likeliest column."""
    t_max, t_sum, gap_s, gap_t, ref = target
    gap = _between(t, a, real, MASKED)
    new_ref = tl.where(peak > s_max, tiles.lane_max(tl.where(a == peak, gap, -float("inf"))), ref)
    gap = gap - new_ref if not MASKED else tl.where(real, gap - new_ref, 0.0)
    new_max = tl.maximum(t_max, tiles.lane_max(t))
    t_factor = tiles.exp2((t_max - new_max) * to_2)
    p = tiles.exp2((t - new_max) * to_2)
    moved = ref - new_ref
    gap_s = tl.fma(tl.fma(s_sum, moved, gap_s), factor, tiles.lane_sum(e * gap))
    gap_t = tl.fma(tl.fma(t_sum, moved, gap_t), t_factor, tiles.lane_sum(p * gap))
    return new_max, tl.fma(t_sum, t_factor, tiles.lane_sum(p)), gap_s, gap_t, new_ref


@triton.jit
def _with_teacher(its, a, e, factor, t, real, to_2, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """(max t, Σ e^v, with three columns Σ e^u (a - t)) of one teacher with one more tile."""
    t_max, t_sum, gap_s = its
    new_max = tl.maximum(t_max, tiles.lane_max(t))
    p = tiles.exp2((t - new_max) * to_2)
    t_sum = tl.fma(t_sum, tiles.exp2((t_max - new_max) * to_2), tiles.lane_sum(p))
    if COLUMNS > 2:
        gap_s = tl.fma(gap_s, factor, tiles.lane_sum(e * _between(a, t, real, MASKED)))
    return new_max, t_sum, gap_s


@triton.jit
def _or_nothing(x, real, MASKED: tl.constexpr):
    if MASKED:
        return tl.where(real, x, -float("inf"))
    return x


@triton.jit
def _between(x, y, real, MASKED: tl.constexpr):
    if MASKED:
        return tl.where(real, x - y, 0.0)
    return x - y


@triton.jit
def _store_own(out, own, to_2):
    """Store the student's columns; (its maximum, by lane what brings sums to that, its sum)."""
    s_max = tiles.row_max(own[0])
    factor = tiles.exp2((own[0] - s_max) * to_2)
    s_sum = tiles.row_sum(own[1] * factor)
    tl.store(out, s_max.to(tl.float64))
    tl.store(out + 1, s_sum)
    return s_max, factor, s_sum


@triton.jit
def _store_target(out, target, own, s_max, factor, s_sum, to_2):
    lane_t_max, lane_t_sum, lane_gap_s, lane_gap_t, lane_ref = target
    t_max = tiles.row_max(lane_t_max)
    t_factor = tiles.exp2((lane_t_max - t_max) * to_2)
    ref = tiles.row_max(tl.where(own[0] == s_max, lane_ref, -float("inf")))
    t_sum = tiles.row_sum(lane_t_sum * t_factor)
    gap_s = tiles.row_sum(tl.fma(own[1], lane_ref - ref, lane_gap_s) * factor)
    gap_t = tiles.row_sum(tl.fma(lane_t_sum, lane_ref - ref, lane_gap_t) * t_factor)
    apart = t_max.to(tl.float64) - s_max.to(tl.float64) - ref.to(tl.float64)
    tl.store(out, t_max.to(tl.float64))
    tl.store(out + 1, t_sum)
    tl.store(out + 2, s_sum * apart - gap_s)
    tl.store(out + 3, gap_t - t_sum * apart)


@triton.jit
def _store_teacher(out, its, weight, s_max, factor, s_sum, to_2, COLUMNS: tl.constexpr):
    """Nothing where the teacher's weight is 0."""
    asked = weight != 0
    t_max = tiles.row_max(its[0])
    t_sum = tiles.row_sum(its[1] * tiles.exp2((its[0] - t_max) * to_2))
    tl.store(out, tl.where(asked, t_max, NOTHING).to(tl.float64))
    tl.store(out + 1, tl.where(asked, t_sum, 0.0))
    if COLUMNS > 2:
        gap_s = tiles.row_sum(its[2] * factor) + s_sum * (t_max.to(tl.float64) - s_max.to(tl.float64))
        tl.store(out + 2, tl.where(asked, gap_s, 0.0))
