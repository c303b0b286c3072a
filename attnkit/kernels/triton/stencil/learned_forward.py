"""The forward kernel of stencils whose queries are all the same: a logit is a number of the key and one of the place.

A program has a patch of queries, some heads and all their channels. It walks over the places of the window, and meets
at each of them the patch's keys as a shifted patch, which lies in the cache. The first walk finds the largest logit of
each window, which the second one subtracts, so that scores of any size are exact.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.stencil.windows import COUNTS, INFINITY, tile_of
from attnkit.kernels.triton.tiles import placed


@triton.jit(do_not_specialize=COUNTS)
def learned_forward(
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
    k_b,
    k_h,
    k_n,
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
    PREFIX: tl.constexpr,
):
    """Output, total and peak of a patch of ROWS1 x ROWS2 queries for BLOCK_H heads.

    Args:
        q: the query's one number of each item and head.
        scale: factor of the logits.
        size0, size1, size2: keys along the axes.
        queries0, queries1, queries2: queries along the axes.
        kernel0, kernel1, kernel2: places of the window along the axes.
        tiles0, tiles1, tiles2: patches along the axes.
        BIAS_VARIES: whether the bias differs from query to query.
        GAIN_VARIES: whether the gain does.
        PREFIX: whether there is a prefix.
    """
    tile, group, item, _ = placed(tiles0 * tiles1 * tiles2, tl.cdiv(heads, BLOCK_H), 1)
    tile0, tile1, tile2 = tile_of(tile, tiles0, tiles1, tiles2)
    row = tl.arange(0, ROWS1 * ROWS2)
    query0 = tile0 + row * 0
    query1 = tile1 * ROWS1 + row // ROWS2
    query2 = tile2 * ROWS2 + row % ROWS2
    there = (query1 < queries1) & (query2 < queries2)
    first0 = query0 * stride0 - kernel0 // 2 * dilation0
    first1 = query1 * stride1 - kernel1 // 2 * dilation1
    first2 = query2 * stride2 - kernel2 // 2 * dilation2
    head = group * BLOCK_H + tl.arange(0, BLOCK_H)
    real = head < heads
    channel = tl.arange(0, BLOCK_V)
    wide = real[:, None] & (channel < VALUE_WIDTH)[None, :]
    factor = tl.load(q + item * q_b + head * q_h, mask=real, other=0.0).to(tl.float32)[None, :] * scale
    k += item * k_b + head[None, :] * k_h
    v += item * v_b + (head[:, None] * v_h + channel[None, :] * v_d)[None, :, :]
    if bias is not None:
        bias += item * bias_b + head[None, :] * bias_h
        bias_p = tl.cast(bias_p, tl.int64)
        if BIAS_VARIES:
            bias += (query0.to(tl.int64) * bias_0 + query1.to(tl.int64) * bias_1 + query2.to(tl.int64) * bias_2)[
                :, None
            ]
    if gain is not None:
        gain += item * gain_b + head[None, :] * gain_h
        gain_p = tl.cast(gain_p, tl.int64)
        if GAIN_VARIES:
            gain += (query0.to(tl.int64) * gain_0 + query1.to(tl.int64) * gain_1 + query2.to(tl.int64) * gain_2)[
                :, None
            ]
    if seen is not None:
        seen += item * seen_b + head[None, :] * seen_h
    pairs = there[:, None] & real[None, :]
    places = kernel0 * kernel1 * kernel2
    top = tl.full((ROWS1 * ROWS2, BLOCK_H), -INFINITY, tl.float32)
    for place in range(prefix + places):
        key, inside = _key_at(
            place,
            prefix,
            first0,
            first1,
            first2,
            size0,
            size1,
            size2,
            kernel1,
            kernel2,
            dilation0,
            dilation1,
            dilation2,
            PREFIX,
        )
        logits = _logits(place, key, inside, pairs, real, k, k_n, factor, bias, bias_p, seen, BIAS_VARIES)
        top = tl.maximum(top, logits)
    base = tl.where(top == -INFINITY, 0.0, top)
    below = tl.zeros((ROWS1 * ROWS2, BLOCK_H), tl.float32)
    mean = tl.zeros((ROWS1 * ROWS2, BLOCK_H, BLOCK_V), tl.float32)
    for place in range(prefix + places):
        key, inside = _key_at(
            place,
            prefix,
            first0,
            first1,
            first2,
            size0,
            size1,
            size2,
            kernel1,
            kernel2,
            dilation0,
            dilation1,
            dilation2,
            PREFIX,
        )
        logits = _logits(place, key, inside, pairs, real, k, k_n, factor, bias, bias_p, seen, BIAS_VARIES)
        weights = tl.exp(logits - base)
        below += weights
        if gain is not None:
            weights *= number_at(gain + place * gain_p, pairs, real, GAIN_VARIES)
        spots = v + (key * v_n)[:, None, None]
        values = tl.load(spots, mask=(there & inside)[:, None, None] & wide[None, :, :], other=0.0)
        mean += weights[:, :, None] * values.to(tl.float32)
    safe = tl.where(below == 0.0, 1.0, below)
    mean *= (1.0 / safe)[:, :, None]
    spot = (query0 * queries1 + query1).to(tl.int64) * queries2 + query2
    out += item * out_b + (head[:, None] * out_h + channel[None, :] * out_d)[None, :, :] + (spot * out_n)[:, None, None]
    tl.store(out, mean.to(out.dtype.element_ty), mask=there[:, None, None] & wide[None, :, :])
    spots = (item * heads + head)[None, :] * queries0 * queries1 * queries2 + spot[:, None]
    tl.store(total + spots, safe, mask=pairs)
    tl.store(peak + spots, top, mask=pairs)


@triton.jit
def _key_at(
    place,
    prefix,
    first0,
    first1,
    first2,
    size0,
    size1,
    size2,
    kernel1,
    kernel2,
    dilation0,
    dilation1,
    dilation2,
    PREFIX: tl.constexpr,
):
    """The key that each query of a patch finds at a place, and whether there is one."""
    spot = place - prefix
    key0 = first0 + spot // (kernel1 * kernel2) * dilation0
    key1 = first1 + spot // kernel2 % kernel1 * dilation1
    key2 = first2 + spot % kernel2 * dilation2
    inside = (key0 >= 0) & (key0 < size0) & (key1 >= 0) & (key1 < size1) & (key2 >= 0) & (key2 < size2)
    key = prefix + (key0 * size1 + key1).to(tl.int64) * size2 + key2
    if PREFIX:
        # All see the prefix.
        key = tl.where(spot < 0, key * 0 + place, key)
        inside = tl.where(spot < 0, key >= 0, inside)
    return key, inside


@triton.jit
def number_at(spots, pairs, real, VARIES: tl.constexpr):
    """What a table holds at a place, (queries or 1, heads)."""
    if VARIES:
        found = tl.load(spots, mask=pairs, other=0.0)
    else:
        found = tl.load(spots, mask=real[None, :], other=0.0)
    return found.to(tl.float32)


@triton.jit
def _logits(place, key, inside, pairs, real, k, k_n, factor, bias, bias_p, seen, VARIES: tl.constexpr):
    """Logits of a patch at a place, (queries, heads): -infinity where there is no key or it is not seen."""
    inside = inside[:, None] & pairs
    logits = tl.load(k + (key * k_n)[:, None], mask=inside, other=0.0).to(tl.float32) * factor
    if bias is not None:
        logits += number_at(bias + place * bias_p, pairs, real, VARIES)
    if seen is not None:
        shown = tl.load(seen + key[:, None], mask=inside, other=0)
        inside = inside & (shown != 0)
    return tl.where(inside, logits, -INFINITY)
