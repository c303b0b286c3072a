"""The gradients of the keys and values of stencils: a patch of keys over all queries that see it.

Each key collects from its queries, so that nothing is added to memory that another program adds to. Prefix tokens,
which all queries see, get theirs by shares of the queries, which are added up afterwards, in order.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.stencil.windows import (
    COUNTS,
    FAR,
    INFINITY,
    denominators,
    key_axis,
    place_of,
    row_of_table,
    sees,
    spot_of,
    tile_of,
    window_start,
)
from attnkit.kernels.triton.tiles import placed, put_rows, rows_at, settled


@triton.jit(do_not_specialize=COUNTS)
def stencil_key_gradient(
    grad_k,
    grad_v,
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
    grad_k_b,
    grad_k_h,
    grad_k_n,
    grad_k_d,
    grad_v_b,
    grad_v_h,
    grad_v_n,
    grad_v_d,
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
    inverse0,
    inverse1,
    inverse2,
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
    PRECISION: tl.constexpr,
):
    """Gradients of a patch of ROWS1 x ROWS2 keys and values outside the prefix.

    Args:
        delta: float32 (B, heads, queries), what `stencil_delta` writes.
        inverse0, inverse1, inverse2: see `key_axis`.
        tiles0, tiles1, tiles2: patches of a class of keys along the axes.
        AXES: how many axes, counted from the last, may be longer than 1.
        CLAMPED: whether windows are moved inside the grid.
    """
    tile, which, item, head = placed(tiles0 * tiles1 * tiles2, dilation0 * dilation1 * dilation2, heads)
    tile0, tile1, tile2 = tile_of(tile, tiles0, tiles1, tiles2)
    rest0, rest1, rest2 = tile_of(which.to(tl.int32), dilation0, dilation1, dilation2)
    residue0, base0, length0, low0, high0 = key_axis(
        tile0, rest0, size0, queries0, stride0, dilation0, step0, inverse0, kernel0, 1, CLAMPED
    )
    residue1, base1, length1, low1, high1 = key_axis(
        tile1, rest1, size1, queries1, stride1, dilation1, step1, inverse1, kernel1, ROWS1, CLAMPED
    )
    residue2, base2, length2, low2, high2 = key_axis(
        tile2, rest2, size2, queries2, stride2, dilation2, step2, inverse2, kernel2, ROWS2, CLAMPED
    )
    row = tl.arange(0, ROWS1 * ROWS2)
    key0 = tile0 + row * 0
    key1 = tile1 * ROWS1 + row // ROWS2
    key2 = tile2 * ROWS2 + row % ROWS2
    there = (key0 < length0) & (key1 < length1) & (key2 < length2)
    place = (rest0 + dilation0 * key0) * size1 + rest1 + dilation1 * key1
    key = prefix + place.to(tl.int64) * size2 + rest2 + dilation2 * key2
    key = tl.where(there, key, -1)
    shown = key
    if seen is not None:
        found = tl.load(seen + item * seen_b + head * seen_h + key, mask=there, other=0)
        shown = tl.where(found != 0, key, -1)
    near = rows_at(k + item * k_b + head * k_h, shown, k_n, k_d, WIDTH, BLOCK_D, True)
    values = rows_at(v + item * v_b + head * v_h, shown, v_n, v_d, VALUE_WIDTH, BLOCK_V, True)
    at = place_of(key0, key1, key2, kernel1, kernel2).to(tl.int64)
    key2 = tl.where(shown >= 0, key2, FAR)
    q += item * q_b + head * q_h
    grad_out += item * grad_out_b + head * grad_out_h
    first = (item * heads + head) * queries0 * queries1 * queries2
    if bias is not None:
        bias += item * bias_b + head * bias_h
    if gain is not None:
        gain += item * gain_b + head * gain_h
    sum_k = tl.zeros((ROWS1 * ROWS2, BLOCK_D), tl.float32)
    sum_v = tl.zeros((ROWS1 * ROWS2, BLOCK_V), tl.float32)
    span1, span2 = high1 - low1, high2 - low2
    box = (high0 - low0) * span1 * span2
    for start in range(0, box, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        number0, number1, number2 = spot_of(column, low0, low1, low2, span1, span2, AXES)
        query0, query1, query2 = residue0 + step0 * number0, residue1 + step1 * number1, residue2 + step2 * number2
        spot = (query0 * queries1 + query1).to(tl.int64) * queries2 + query2
        spot = tl.where(column < box, spot, -1)
        start0 = window_start(base0 + stride0 * step0 // dilation0 * number0, length0, kernel0, CLAMPED)
        start1 = window_start(base1 + stride1 * step1 // dilation1 * number1, length1, kernel1, CLAMPED)
        start2 = window_start(base2 + stride2 * step2 // dilation2 * number2, length2, kernel2, CLAMPED)
        corner = place_of(start0, start1, start2, kernel1, kernel2)
        start2 = tl.where(column < box, start2, -FAR)
        inside = sees(
            start0[None, :],
            start1[None, :],
            start2[None, :],
            key0[:, None],
            key1[:, None],
            key2[:, None],
            kernel0,
            kernel1,
            kernel2,
            AXES,
        )
        rows = rows_at(q, spot, q_n, q_d, WIDTH, BLOCK_D, True)
        logits = tl.dot(near, tl.trans(rows), input_precision=PRECISION) * scale
        if bias is not None:
            added = row_of_table(bias, bias_p, bias_0, bias_1, bias_2, prefix, query0, query1, query2, corner)
            logits += tl.load(added[None, :] + (at * bias_p)[:, None], mask=inside, other=0.0).to(tl.float32)
        logits = tl.where(inside, logits, -INFINITY)
        base, share = denominators(total + first, peak + first, spot)
        average = settled(tl.load(delta + first + spot, mask=spot >= 0, other=0.0))
        grads = rows_at(grad_out, spot, grad_out_n, grad_out_d, VALUE_WIDTH, BLOCK_V, True)
        weights = tl.exp(logits - settled(base)[None, :]) * settled(share)[None, :]
        reached = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        gained = weights
        if gain is not None:
            added = row_of_table(gain, gain_p, gain_0, gain_1, gain_2, prefix, query0, query1, query2, corner)
            factor = tl.load(added[None, :] + (at * gain_p)[:, None], mask=inside, other=0.0).to(tl.float32)
            reached *= factor
            gained = weights * factor
        sum_v = tl.dot(gained.to(grads.dtype), grads, sum_v, input_precision=PRECISION)
        pull = weights * (reached - average[None, :])
        sum_k = tl.dot(pull.to(rows.dtype), rows, sum_k, input_precision=PRECISION)
    put_rows(grad_k + item * grad_k_b + head * grad_k_h, key, grad_k_n, grad_k_d, sum_k * scale, WIDTH, BLOCK_D, True)
    put_rows(grad_v + item * grad_v_b + head * grad_v_h, key, grad_v_n, grad_v_d, sum_v, VALUE_WIDTH, BLOCK_V, True)


@triton.jit(do_not_specialize=COUNTS)
def stencil_prefix_gradient(
    sum_k,
    sum_v,
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
    batch,
    heads,
    prefix,
    queries0,
    queries1,
    queries2,
    share,
    shares,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a share of the queries gives to a tile of BLOCK_N prefix keys and values.

    Args:
        sum_k: float32 (shares, B, heads, prefix, WIDTH).
        sum_v: the same for values.
        share: queries of a share, a multiple of BLOCK_M.
    """
    tile, number, item, head = placed(tl.cdiv(prefix, BLOCK_N), shares, heads)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    key = tl.where(column < prefix, column, -1).to(tl.int64)
    shown = key
    if seen is not None:
        found = tl.load(seen + item * seen_b + head * seen_h + key, mask=key >= 0, other=0)
        shown = tl.where(found != 0, key, -1)
    near = rows_at(k + item * k_b + head * k_h, shown, k_n, k_d, WIDTH, BLOCK_D, True)
    values = rows_at(v + item * v_b + head * v_h, shown, v_n, v_d, VALUE_WIDTH, BLOCK_V, True)
    queries = queries0 * queries1 * queries2
    q += item * q_b + head * q_h
    grad_out += item * grad_out_b + head * grad_out_h
    first = (item * heads + head) * queries
    if bias is not None:
        bias += item * bias_b + head * bias_h
    if gain is not None:
        gain += item * gain_b + head * gain_h
    sum0 = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum1 = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, share, BLOCK_M):
        spot = number * share + start + tl.arange(0, BLOCK_M)
        query0, query1, query2 = spot // queries2 // queries1, spot // queries2 % queries1, spot % queries2
        spot = tl.where(spot < queries, spot, -1)
        inside = (shown >= 0)[:, None] & (spot >= 0)[None, :]
        rows = rows_at(q, spot, q_n, q_d, WIDTH, BLOCK_D, True)
        logits = tl.dot(near, tl.trans(rows), input_precision=PRECISION) * scale
        if bias is not None:
            added = bias + query0 * bias_0 + query1 * bias_1 + query2 * bias_2
            logits += tl.load(added[None, :] + (key * bias_p)[:, None], mask=inside, other=0.0).to(tl.float32)
        logits = tl.where(inside, logits, -INFINITY)
        base, part = denominators(total + first, peak + first, spot)
        average = settled(tl.load(delta + first + spot, mask=spot >= 0, other=0.0))
        grads = rows_at(grad_out, spot, grad_out_n, grad_out_d, VALUE_WIDTH, BLOCK_V, True)
        weights = tl.exp(logits - settled(base)[None, :]) * settled(part)[None, :]
        reached = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        gained = weights
        if gain is not None:
            added = gain + query0 * gain_0 + query1 * gain_1 + query2 * gain_2
            factor = tl.load(added[None, :] + (key * gain_p)[:, None], mask=inside, other=0.0).to(tl.float32)
            reached *= factor
            gained = weights * factor
        sum1 = tl.dot(gained.to(grads.dtype), grads, sum1, input_precision=PRECISION)
        pull = weights * (reached - average[None, :])
        sum0 = tl.dot(pull.to(rows.dtype), rows, sum0, input_precision=PRECISION)
    at = ((number * batch + item) * heads + head) * prefix
    put_rows(sum_k + at * WIDTH, key, WIDTH, 1, sum0 * scale, WIDTH, BLOCK_D, True)
    put_rows(sum_v + at * VALUE_WIDTH, key, VALUE_WIDTH, 1, sum1, VALUE_WIDTH, BLOCK_V, True)
