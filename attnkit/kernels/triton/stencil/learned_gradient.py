"""The gradients of the keys and values of stencils whose queries are all the same: a patch of keys over its queries.

A key meets at each place of the window one query that finds it there. With weights p, what its value gets is the sum of
`p * gain * grad_out`, and the value times that sum is what its logits are pulled by: no product of channels is summed
up at the places.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.stencil.learned_forward import number_at
from attnkit.kernels.triton.stencil.windows import COUNTS, INFINITY, tile_of
from attnkit.kernels.triton.tiles import placed


@triton.jit(do_not_specialize=COUNTS)
def learned_gradient(
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
    k_b,
    k_h,
    k_n,
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
    tiles0,
    tiles1,
    tiles2,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS1: tl.constexpr,
    ROWS2: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BIAS_VARIES: tl.constexpr,
    GAIN_VARIES: tl.constexpr,
):
    """Gradients of a patch of ROWS1 x ROWS2 keys and values outside the prefix for BLOCK_H heads.

    Args:
        grad_k: of the keys' one number.
        delta: float32 (B, heads, queries), what `stencil_delta` writes.
        q: the query's one number of each item and head.
        tiles0, tiles1, tiles2: patches of keys along the axes.
        BIAS_VARIES: whether the bias differs from query to query.
        GAIN_VARIES: whether the gain does.
    """
    tile, group, item, _ = placed(tiles0 * tiles1 * tiles2, tl.cdiv(heads, BLOCK_H), 1)
    tile0, tile1, tile2 = tile_of(tile, tiles0, tiles1, tiles2)
    row = tl.arange(0, ROWS1 * ROWS2)
    key0 = tile0 + row * 0
    key1 = tile1 * ROWS1 + row // ROWS2
    key2 = tile2 * ROWS2 + row % ROWS2
    there = (key1 < size1) & (key2 < size2)
    key = prefix + (key0 * size1 + key1).to(tl.int64) * size2 + key2
    head = group * BLOCK_H + tl.arange(0, BLOCK_H)
    real = head < heads
    pairs = there[:, None] & real[None, :]
    channel = tl.arange(0, BLOCK_V)
    wide = real[:, None] & (channel < VALUE_WIDTH)[None, :]
    whole = there[:, None, None] & wide[None, :, :]
    factor = tl.load(q + item * q_b + head * q_h, mask=real, other=0.0).to(tl.float32)[None, :] * scale
    scores = tl.load(k + item * k_b + head[None, :] * k_h + (key * k_n)[:, None], mask=pairs, other=0.0)
    scores = scores.to(tl.float32) * factor
    if seen is not None:
        shown = tl.load(seen + item * seen_b + head[None, :] * seen_h + key[:, None], mask=pairs, other=0)
        scores = tl.where(shown != 0, scores, -INFINITY)
    grad_out += item * grad_out_b + (head[:, None] * grad_out_h + channel[None, :] * grad_out_d)[None, :, :]
    if bias is not None:
        bias += item * bias_b + head[None, :] * bias_h
        bias_p = tl.cast(bias_p, tl.int64)
    if gain is not None:
        gain += item * gain_b + head[None, :] * gain_h
        gain_p = tl.cast(gain_p, tl.int64)
    first = ((item * heads + head) * queries0 * queries1 * queries2)[None, :]
    below = tl.zeros((ROWS1 * ROWS2, BLOCK_H), tl.float32)
    sum_v = tl.zeros((ROWS1 * ROWS2, BLOCK_H, BLOCK_V), tl.float32)
    for place in range(kernel0 * kernel1 * kernel2):
        query0, inside0 = _query_at(key0, place // (kernel1 * kernel2), queries0, kernel0, stride0, dilation0)
        query1, inside1 = _query_at(key1, place // kernel2 % kernel1, queries1, kernel1, stride1, dilation1)
        query2, inside2 = _query_at(key2, place % kernel2, queries2, kernel2, stride2, dilation2)
        inside = there & inside0 & inside1 & inside2
        spot = (query0 * queries1 + query1).to(tl.int64) * queries2 + query2
        known = inside[:, None] & real[None, :]
        logits = scores
        if bias is not None:
            added = bias + (prefix + place) * bias_p
            if BIAS_VARIES:
                varied = query0.to(tl.int64) * bias_0 + query1.to(tl.int64) * bias_1 + query2.to(tl.int64) * bias_2
                added += varied[:, None]
            logits += number_at(added, known, real, BIAS_VARIES)
        base = tl.load(peak + first + spot[:, None], mask=known, other=INFINITY)
        base = tl.where(base == -INFINITY, INFINITY, base)
        weights = tl.exp(logits - base) / tl.load(total + first + spot[:, None], mask=known, other=1.0)
        below += weights * tl.load(delta + first + spot[:, None], mask=known, other=0.0)
        if gain is not None:
            added = gain + (prefix + place) * gain_p
            if GAIN_VARIES:
                varied = query0.to(tl.int64) * gain_0 + query1.to(tl.int64) * gain_1 + query2.to(tl.int64) * gain_2
                added += varied[:, None]
            weights *= number_at(added, known, real, GAIN_VARIES)
        spots = grad_out + (spot * grad_out_n)[:, None, None]
        grads = tl.load(spots, mask=inside[:, None, None] & wide[None, :, :], other=0.0)
        sum_v += weights[:, :, None] * grads.to(tl.float32)
    spots = v + item * v_b + (head[:, None] * v_h + channel[None, :] * v_d)[None, :, :] + (key * v_n)[:, None, None]
    values = tl.load(spots, mask=whole, other=0.0).to(tl.float32)
    pull = tl.sum(sum_v * values, 2) - below
    spots = grad_k + item * grad_k_b + head[None, :] * grad_k_h + (key * grad_k_n)[:, None]
    tl.store(spots, (pull * factor).to(grad_k.dtype.element_ty), mask=pairs)
    grad_v += item * grad_v_b + (head[:, None] * grad_v_h + channel[None, :] * grad_v_d)[None, :, :]
    tl.store(grad_v + (key * grad_v_n)[:, None, None], sum_v.to(grad_v.dtype.element_ty), mask=whole)


@triton.jit
def _query_at(key, place, queries, kernel, stride, dilation):
    """The query that finds each key at a place of its window, along an axis, and whether there is one."""
    middle = key + (kernel // 2 - place) * dilation
    query = middle // stride
    return query, (middle >= 0) & (query * stride == middle) & (query < queries)
