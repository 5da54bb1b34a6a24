"""Tiles of rows for the Triton kernels: which columns each lane has, how they are loaded, what lanes add up.

A tile is [parts, LANES, VECTOR]: a lane, which is a thread, has VECTOR neighbouring columns of each part, which are 16
bytes. Maxima and sums of a lane's columns need no other thread; lanes are put together once a row. All
tiles of a row but the last are full and need no mask, whatever the row's width is: a mask in the middle of 16 bytes
would split their load into 2-byte ones.

Rows that do not begin at 16 bytes (a vocabulary of odd size, without padding) have tiles that do: `lead` columns before
the row are in its first tile, which has a mask too. The matrices of a call then begin alike.

Products that are added are written as `fma`, and the compiler contracts nothing (`enable_fp_fusion=False`), so what two
kernels compute alike is rounded alike. Triton's interpreter knows no inline assembly, hence `INTERPRETED`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp2(x):
    """2^x; results below the smallest normal number are 0."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def log2(x):
    """log2(x) of a normal number, to 2^-22."""
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def rows_of(
    student, stride, teachers, strides, index, weights, lead,
    N: tl.constexpr, HAS_INDEX: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """(where the first tile of the program's row begins, the same in each teacher, the teachers' weights, `lead` of the
    row). The argument `lead` is that of the first row."""
    at = tl.program_id(0).to(tl.int64)
    if HAS_INDEX:
        at = tl.load(index + at)
    lead = ((lead + at * stride) % 8).to(tl.int32) if SHIFTED else 0
    found = ()
    for n in tl.static_range(N):
        found += (_begin(teachers[n], at, strides[n], lead, SHIFTED),)
    return _begin(student, at, stride, lead, SHIFTED), found, numbers_of(weights, N), lead


@triton.jit
def _begin(matrix, at, stride, lead, SHIFTED: tl.constexpr):
    first = matrix + at * stride - lead
    if SHIFTED:
        return tl.multiple_of(first, 16)
    return first


@triton.jit
def numbers_of(table, COUNT: tl.constexpr):
    """The COUNT numbers that the program's row has in a table."""
    found = ()
    for n in tl.static_range(COUNT):
        found += (tl.load(table + tl.program_id(0).to(tl.int64) * COUNT + n),)
    return found


@triton.jit
def columns_of(start, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A tile's columns."""
    part = tl.arange(0, TILE // (LANES * VECTOR))[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    return start + (part * LANES + lane) * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def ragged_of(i, FULL: tl.constexpr, HEAD: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The columns of a tile that has a mask: the row's first with `i` -1, which HEAD rows have, else number `i` behind
    the FULL columns without one."""
    start = FULL + i * TILE if HEAD == 0 else tl.where(i < 0, 0, FULL + i * TILE)
    return columns_of(start, TILE, LANES, VECTOR)


@triton.jit
def load(row, columns, real, MASKED: tl.constexpr):
    """Float32; 0 where a column is not real."""
    if MASKED:
        return tl.load(row + columns, real, other=0.0).to(tl.float32)
    return tl.load(row + columns).to(tl.float32)


@triton.jit
def load_asked(row, weight, columns, real, N: tl.constexpr, MASKED: tl.constexpr):
    """One of N teachers; 0 where it has no weight, which one by itself always has: it is not read there."""
    if N == 1:
        return load(row, columns, real, MASKED)
    asked = tl.zeros(columns.shape, tl.float32) + weight != 0
    return load(row, columns, real & asked if MASKED else asked, True)


@triton.jit
def add_weighted(total, weight, z, FIRST: tl.constexpr, N: tl.constexpr):
    """total + weight z; the weight of one by itself is 1."""
    if N == 1:
        return z
    if FIRST:
        return weight * z
    return tl.fma(z, weight, total)


@triton.jit
def mean_logits(teachers, weights, columns, real, N: tl.constexpr, MASKED: tl.constexpr):
    """Σ w_n z_n of a tile."""
    total = 0.0
    for n in tl.static_range(N):
        z = load_asked(teachers[n], weights[n], columns, real, N, MASKED)
        total = add_weighted(total, weights[n], z, n == 0, N)
    return total


@triton.jit
def lane_max(x):
    """The largest of each lane's columns, [1, LANES, 1]."""
    return tl.max(tl.max(x, 2, keep_dims=True), 0, keep_dims=True)


@triton.jit
def lane_sum(x):
    """The sum of each lane's columns, [1, LANES, 1]."""
    return tl.sum(tl.sum(x, 2, keep_dims=True), 0, keep_dims=True)


@triton.jit
def row_max(x):
    """The largest of all lanes."""
    return tl.max(tl.max(tl.max(x, 2), 0), 0)


@triton.jit
def row_sum(x):
    """The sum over all lanes, float64."""
    return tl.sum(tl.sum(tl.sum(x.to(tl.float64), 2), 0), 0)
