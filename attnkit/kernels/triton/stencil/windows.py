"""Windows: where a tile of queries or keys lies on the grid, which keys it may see, and which of them a query sees.

Along an axis, keys whose positions have the same remainder modulo the dilation are a *class*, and are numbered within
it; a query sees keys of one class, next to each other. Queries that see a class are a `step` apart, and `per` keys lie
between the middles of their windows. So every kernel meets windows without gaps, whatever the dilation and stride are.

Grids have three axes here, the first of which may have length 1. Numbers along axes are 32 bits wide, those of tokens
64. Every function is inlined; arguments in capitals are constants of the compiled kernel.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
# Arguments of kernels that change with the image and on which no load of several numbers at once depends. Triton would
# compile a kernel anew for each combination of those that are 1, divisible by 16, or neither.
COUNTS = (
    *(
        "heads",
        "prefix",
        "queries",
        "size1",
        "size2",
        "queries1",
        "queries2",
        "tiles1",
        "tiles2",
        "share",
        "shares",
        "items",
    ),
    *("seen_b", "seen_h", "grad_total_b", "grad_total_h", "bias_b", "bias_h", "gain_b", "gain_h", "batch"),
)
# Further away than any window reaches.
FAR = tl.constexpr(1 << 28)


@triton.jit
def window_start(middle, length, kernel, CLAMPED: tl.constexpr):
    """The first key of a window in its class, which may lie outside where windows are not CLAMPED.

    Args:
        middle: the key in the window's middle.
        length: keys of the class.
        kernel: keys of a window.
    """
    first = middle - kernel // 2
    if CLAMPED:
        first = tl.maximum(tl.minimum(first, length - kernel), 0)
    return first


@triton.jit
def query_axis(tile, residue, size, queries, stride, dilation, step, kernel, ROWS: tl.constexpr, CLAMPED: tl.constexpr):
    """Along an axis, a tile of ROWS queries `residue`, `residue + step`, ... and the keys that it sees.

    Returns:
        Middle of the first query's window, position of the class's first key, number of its keys, and which of them the
        tile sees, from the first to before the last.
    """
    base = stride * residue // dilation
    rest = stride * residue % dilation
    length = (size - rest + dilation - 1) // dilation
    per = stride * step // dilation
    count = (queries - residue + step - 1) // step
    last = tl.minimum((tile + 1) * ROWS, count) - 1
    low = tl.maximum(window_start(base + per * tile * ROWS, length, kernel, CLAMPED), 0)
    high = tl.minimum(window_start(base + per * last, length, kernel, CLAMPED) + kernel, length)
    return base + per * tile * ROWS, rest, length, low, tl.maximum(high, low)


@triton.jit
def key_axis(
    tile, rest, size, queries, stride, dilation, step, inverse, kernel, ROWS: tl.constexpr, CLAMPED: tl.constexpr
):
    """Along an axis, a tile of ROWS keys at positions `rest`, `rest + dilation`, ... and the queries that see it.

    Args:
        inverse: of `stride / gcd(stride, dilation)` modulo `step`.

    Returns:
        Number of the first query of the class, middle of its window, keys of the class, and which of the class's
        queries see the tile, from the first to before the last.
    """
    common = dilation // step
    residue = rest // common * inverse % step
    base = stride * residue // dilation
    length = (size - rest + dilation - 1) // dilation
    per = stride * step // dilation
    count = tl.maximum((queries - residue + step - 1) // step, 0)
    first = tile * ROWS
    last = tl.minimum(first + ROWS, length) - 1
    before = first - kernel + 1 + kernel // 2 - base
    after = last + kernel // 2 - base
    low = (tl.maximum(before, 0) + per - 1) // per
    high = tl.where(after >= 0, tl.maximum(after, 0) // per + 1, 0)
    if CLAMPED:
        low = tl.where(first < kernel, 0, low)
        high = tl.where(last >= length - kernel, count, high)
    # Between the classes that queries see lie some that none does.
    high = tl.where(rest % common == 0, tl.minimum(high, count), 0)
    return residue, base, length, low, tl.maximum(high, low)


@triton.jit
def tile_of(program, tiles0, tiles1, tiles2):
    """Numbers of a tile along the axes."""
    rest = program // tiles2
    return rest // tiles1 % tiles0, rest % tiles1, program % tiles2


@triton.jit
def spot_of(column, low0, low1, low2, span1, span2, AXES: tl.constexpr):
    """Where the columns of a box lie, the last axis fastest."""
    second = low2 + column % span2
    rest = column // span2
    if AXES == 3:
        zeroth = low0 + rest // span1
        first = low1 + rest % span1
    else:
        zeroth = low0 + column * 0
        first = low1 + rest
    return zeroth, first, second


@triton.jit
def sees(starts0, starts1, starts2, keys0, keys1, keys2, kernel0, kernel1, kernel2, AXES: tl.constexpr):
    """Which keys lie in which windows; starts and keys broadcast to a tile."""
    near = keys2 - starts2
    inside = (near >= 0) & (near < kernel2)
    if AXES >= 2:
        near = keys1 - starts1
        inside = inside & (near >= 0) & (near < kernel1)
    if AXES == 3:
        near = keys0 - starts0
        inside = inside & (near >= 0) & (near < kernel0)
    return inside


@triton.jit
def row_of_table(table, table_p, table_0, table_1, table_2, prefix, query0, query1, query2, corner):
    """Pointers to what a table by place holds for queries at the key of number 0, of which the others count on.

    Args:
        table: pointer to the part of an item and head.
        query0, query1, query2: numbers of the queries along the axes.
        corner: what `place_of` gives for the first keys of their windows.
    """
    offset = query0.to(tl.int64) * table_0 + query1.to(tl.int64) * table_1 + query2.to(tl.int64) * table_2
    return table + offset + (prefix - corner).to(tl.int64) * table_p


@triton.jit
def place_of(at0, at1, at2, kernel1, kernel2):
    """Number of a place in a row-major window."""
    return (at0 * kernel1 + at1) * kernel2 + at2


@triton.jit
def denominators(total, peak, spot):
    """What is subtracted from each query's logits, and what their powers are multiplied by then, to become weights.

    Infinity and 0 where a query sees nothing and for spots below 0.
    """
    there = spot >= 0
    base = tl.load(peak + spot, mask=there, other=INFINITY)
    below = tl.load(total + spot, mask=there, other=INFINITY)
    return tl.where(base == -INFINITY, INFINITY, base), 1.0 / below


@triton.jit
def key_on_axis(query, place, size, stride, dilation, kernel, CLAMPED: tl.constexpr):
    """The key that a query finds at a place of its window, along an axis, and whether there is one."""
    rest = query * stride % dilation
    length = (size - rest + dilation - 1) // dilation
    number = window_start(query * stride // dilation, length, kernel, CLAMPED) + place
    return rest + dilation * number, (number >= 0) & (number < length)
