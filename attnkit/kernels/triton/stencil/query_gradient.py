"""The gradient of the queries of stencils: the walk of the forward kernel once more, with the weights made anew."""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.stencil.windows import (
    COUNTS,
    FAR,
    INFINITY,
    denominators,
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
def stencil_query_gradient(
    grad_q,
    delta,
    grad_out,
    q,
    k,
    v,
    total,
    peak,
    bias,
    gain,
    seen,
    scale,
    grad_q_b,
    grad_q_h,
    grad_q_n,
    grad_q_d,
    grad_out_b,
    grad_out_h,
    grad_out_n,
    grad_out_d,
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
    """Gradient of a patch of ROWS1 x ROWS2 queries; arguments as for `stencil_forward`.

    With weights p and `reached = gain * grad_out . v`, the logits get `p * (reached - delta)`.

    Args:
        delta: float32 (B, heads, queries), what `stencil_delta` writes.
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
    theirs = grad_out + item * grad_out_b + head * grad_out_h
    grads = rows_at(theirs, spot, grad_out_n, grad_out_d, VALUE_WIDTH, BLOCK_V, True)
    first = (item * heads + head) * queries0 * queries1 * queries2
    base, share = denominators(total + first, peak + first, spot)
    average = tl.load(delta + first + spot, mask=there, other=0.0)
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
    grad = tl.zeros((ROWS1 * ROWS2, BLOCK_D), tl.float32)
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
            grad = _pulled(logits, factor, base, share, average, grads, near, values, grad, PRECISION)
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
        grad = _pulled(logits, factor, base, share, average, grads, near, values, grad, PRECISION)
    put_rows(grad_q + item * grad_q_b + head * grad_q_h, spot, grad_q_n, grad_q_d, grad * scale, WIDTH, BLOCK_D, True)


@triton.jit
def _pulled(logits, factor, base, share, average, grads, near, values, grad, PRECISION: tl.constexpr):
    """The queries' gradient before it is scaled, with a tile of keys more."""
    weights = tl.exp(logits - base[:, None]) * share[:, None]
    reached = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
    if factor is not None:
        reached *= factor.to(tl.float32)
    pull = weights * (reached - average[:, None])
    return tl.dot(pull.to(near.dtype), near, grad, input_precision=PRECISION)
