"""The forward kernel of stencils with a query for every place: a patch of queries over all keys that it sees.

Keys and values are read where they stand, a tile of the box around the patch's windows at a time; a mask leaves to each
query its own window. The softmax is online, and exact for logits of any size.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.stencil.windows import (
    COUNTS,
    FAR,
    INFINITY,
    place_of,
    query_axis,
    row_of_table,
    sees,
    spot_of,
    tile_of,
    window_start,
)
from attnkit.kernels.triton.tiles import placed, put_rows, rows_at


@triton.jit(do_not_specialize=COUNTS)
def stencil_forward(
    q,
    k,
    v,
    out,
    total,
    peak,
    bias,
    gain,
    seen,
    scale,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    out_b,
    out_h,
    out_n,
    out_d,
    bias_b,
    bias_h,
    bias_p,
    bias_0,
    bias_1,
    bias_2,
    gain_b,
    gain_h,
    gain_p,
    gain_0,
    gain_1,
    gain_2,
    seen_b,
    seen_h,
    heads,
    prefix,
    size0,
    size1,
    size2,
    queries0,
    queries1,
    queries2,
    kernel0,
    kernel1,
    kernel2,
    stride0,
    stride1,
    stride2,
    dilation0,
    dilation1,
    dilation2,
    step0,
    step1,
    step2,
    tiles0,
    tiles1,
    tiles2,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS1: tl.constexpr,
    ROWS2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AXES: tl.constexpr,
    CLAMPED: tl.constexpr,
    PREFIX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output, total and peak of a patch of ROWS1 x ROWS2 queries.

    Args:
        scale: factor of the logits.
        size0, size1, size2: keys along the axes.
        queries0, queries1, queries2: queries along the axes.
        kernel0, kernel1, kernel2: keys of a window along the axes.
        step0, step1, step2: how far queries of one class lie apart.
        tiles0, tiles1, tiles2: patches of a class along the axes.
        AXES: how many axes, counted from the last, may be longer than 1.
        CLAMPED: whether windows are moved inside the grid.
        PREFIX: whether there is a prefix.
    """
    tile, which, item, head = placed(tiles0 * tiles1 * tiles2, step0 * step1 * step2, heads)
    tile0, tile1, tile2 = tile_of(tile, tiles0, tiles1, tiles2)
    residue0, residue1, residue2 = tile_of(which.to(tl.int32), step0, step1, step2)
    middle0, rest0, length0, low0, high0 = query_axis(
        tile0, residue0, size0, queries0, stride0, dilation0, step0, kernel0, 1, CLAMPED
    )
    middle1, rest1, length1, low1, high1 = query_axis(
        tile1, residue1, size1, queries1, stride1, dilation1, step1, kernel1, ROWS1, CLAMPED
    )
    middle2, rest2, length2, low2, high2 = query_axis(
        tile2, residue2, size2, queries2, stride2, dilation2, step2, kernel2, ROWS2, CLAMPED
    )
    row = tl.arange(0, ROWS1 * ROWS2)
    row1, row2 = row // ROWS2, row % ROWS2
    query0 = residue0 + step0 * tile0 + row * 0
    query1 = residue1 + step1 * (tile1 * ROWS1 + row1)
    query2 = residue2 + step2 * (tile2 * ROWS2 + row2)
    there = (query0 < queries0) & (query1 < queries1) & (query2 < queries2)
    spot = (query0 * queries1 + query1).to(tl.int64) * queries2 + query2
    spot = tl.where(there, spot, -1)
    middle1 += stride1 * step1 // dilation1 * row1
    middle2 += stride2 * step2 // dilation2 * row2
    start0 = window_start(middle0, length0, kernel0, CLAMPED)
    start1 = window_start(middle1, length1, kernel1, CLAMPED)
    start2 = window_start(middle2, length2, kernel2, CLAMPED)
    rows = rows_at(q + item * q_b + head * q_h, spot, q_n, q_d, WIDTH, BLOCK_D, True)
    k += item * k_b + head * k_h
    v += item * v_b + head * v_h
    if seen is not None:
        seen += item * seen_b + head * seen_h
    corner = place_of(start0, start1, start2, kernel1, kernel2)
    if bias is not None:
        bias += item * bias_b + head * bias_h
        bias_row = row_of_table(bias, bias_p, bias_0, bias_1, bias_2, prefix, query0, query1, query2, corner)
    if gain is not None:
        gain += item * gain_b + head * gain_h
        gain_row = row_of_table(gain, gain_p, gain_0, gain_1, gain_2, prefix, query0, query1, query2, corner)
    top = tl.full((ROWS1 * ROWS2,), -INFINITY, tl.float32)
    below = tl.zeros((ROWS1 * ROWS2,), tl.float32)
    mean = tl.zeros((ROWS1 * ROWS2, BLOCK_V), tl.float32)
    if PREFIX:
        for start in range(0, prefix, 16):
            column = start + tl.arange(0, 16)
            key = tl.where(column < prefix, column, -1).to(tl.int64)
            if seen is not None:
                shown = tl.load(seen + key, mask=key >= 0, other=0)
                key = tl.where(shown != 0, key, -1)
            near = rows_at(k, key, k_n, k_d, WIDTH, BLOCK_D, True)
            logits = tl.dot(rows, tl.trans(near), input_precision=PRECISION) * scale
            inside = there[:, None] & (key >= 0)[None, :]
            if bias is not None:
                far = (column.to(tl.int64) - prefix) * bias_p
                spots = (bias_row + corner.to(tl.int64) * bias_p)[:, None] + far[None, :]
                logits += tl.load(spots, mask=inside, other=0.0).to(tl.float32)
            logits = tl.where((key >= 0)[None, :], logits, -INFINITY)
            factor = None
            if gain is not None:
                far = (column.to(tl.int64) - prefix) * gain_p
                spots = (gain_row + corner.to(tl.int64) * gain_p)[:, None] + far[None, :]
                factor = tl.load(spots, mask=inside, other=0.0)
            values = rows_at(v, key, v_n, v_d, VALUE_WIDTH, BLOCK_V, True)
            top, below, mean = _met(logits, factor, values, top, below, mean, PRECISION)
    span1, span2 = high1 - low1, high2 - low2
    box = (high0 - low0) * span1 * span2
    for start in range(0, box, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        key0, key1, key2 = spot_of(column, low0, low1, low2, span1, span2, AXES)
        place = (rest0 + dilation0 * key0) * size1 + rest1 + dilation1 * key1
        key = prefix + place.to(tl.int64) * size2 + rest2 + dilation2 * key2
        key = tl.where(column < box, key, -1)
        if seen is not None:
            shown = tl.load(seen + key, mask=key >= 0, other=0)
            key = tl.where(shown != 0, key, -1)
        at = place_of(key0, key1, key2, kernel1, kernel2).to(tl.int64)
        key2 = tl.where(key >= 0, key2, FAR)
        inside = sees(
            start0,
            start1[:, None],
            start2[:, None],
            key0[None, :],
            key1[None, :],
            key2[None, :],
            kernel0,
            kernel1,
            kernel2,
            AXES,
        )
        near = rows_at(k, key, k_n, k_d, WIDTH, BLOCK_D, True)
        logits = tl.dot(rows, tl.trans(near), input_precision=PRECISION) * scale
        if bias is not None:
            spots = bias_row[:, None] + (at * bias_p)[None, :]
            logits += tl.load(spots, mask=inside & there[:, None], other=0.0).to(tl.float32)
        logits = tl.where(inside, logits, -INFINITY)
        factor = None
        if gain is not None:
            factor = tl.load(gain_row[:, None] + (at * gain_p)[None, :], mask=inside & there[:, None], other=0.0)
        values = rows_at(v, key, v_n, v_d, VALUE_WIDTH, BLOCK_V, True)
        top, below, mean = _met(logits, factor, values, top, below, mean, PRECISION)
    safe = tl.where(below == 0.0, 1.0, below)
    out += item * out_b + head * out_h
    put_rows(out, spot, out_n, out_d, mean / safe[:, None], VALUE_WIDTH, BLOCK_V, True)
    first = (item * heads + head) * queries0 * queries1 * queries2
    tl.store(total + first + spot, safe, mask=there)
    tl.store(peak + first + spot, top, mask=there)


@triton.jit
def _met(logits, factor, values, top, below, mean, PRECISION: tl.constexpr):
    """A step of online softmax: the largest logit, sum of powers and sum of values of each row, with a tile more.

    Args:
        factor: what the weights of the values are multiplied by, or None.
    """
    higher = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(higher == -INFINITY, 0.0, higher)
    weights = tl.exp(logits - shift[:, None])
    kept = tl.exp(top - shift)
    below = below * kept + tl.sum(weights, 1)
    if factor is not None:
        weights *= factor.to(tl.float32)
    mean = tl.dot(weights.to(values.dtype), values, mean * kept[:, None], input_precision=PRECISION)
    return higher, below, mean
