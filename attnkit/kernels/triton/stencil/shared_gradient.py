"""What all gradients of stencils start from: what is taken off everything that a query reaches, and a query's pair."""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.stencil.learned_forward import number_at
from attnkit.kernels.triton.stencil.windows import COUNTS, INFINITY, key_on_axis
from attnkit.kernels.triton.tiles import placed


@triton.jit(do_not_specialize=COUNTS)
def stencil_delta(
    delta,
    grad_out,
    grad_total,
    out,
    total,
    grad_out_b,
    grad_out_h,
    grad_out_n,
    grad_out_d,
    grad_total_b,
    grad_total_h,
    grad_total_n,
    out_b,
    out_h,
    out_n,
    out_d,
    heads,
    queries,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """`grad_out . out`, less what arrives at the lse, of BLOCK_M queries for BLOCK_H heads.

    Args:
        delta: float32 (B, heads, queries), written here.
        grad_total: gradient of the totals, or None.
        queries: how many there are.
    """
    tile, group, item, _ = placed(tl.cdiv(queries, BLOCK_M), tl.cdiv(heads, BLOCK_H), 1)
    spot = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    head = group * BLOCK_H + tl.arange(0, BLOCK_H)
    channel = tl.arange(0, BLOCK_V)
    pairs = (spot < queries)[:, None] & (head < heads)[None, :]
    whole = pairs[:, :, None] & (channel < VALUE_WIDTH)[None, None, :]
    rows = head[:, None] * grad_out_h + channel[None, :] * grad_out_d
    grads = tl.load(
        grad_out + item * grad_out_b + (spot * grad_out_n)[:, None, None] + rows[None, :, :], mask=whole, other=0.0
    )
    rows = head[:, None] * out_h + channel[None, :] * out_d
    means = tl.load(out + item * out_b + (spot * out_n)[:, None, None] + rows[None, :, :], mask=whole, other=0.0)
    average = tl.sum(grads.to(tl.float32) * means.to(tl.float32), 2)
    spots = (item * heads + head)[None, :] * queries + spot[:, None]
    if grad_total is not None:
        arrived = grad_total + item * grad_total_b + head[None, :] * grad_total_h + (spot * grad_total_n)[:, None]
        below = tl.load(total + spots, mask=pairs, other=0.0)
        average -= tl.load(arrived, mask=pairs, other=0.0).to(tl.float32) * below
    tl.store(delta + spots, average, mask=pairs)


@triton.jit
def at_place(
    place,
    spot,
    item,
    head,
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
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BIAS_VARIES: tl.constexpr,
    GAIN_VARIES: tl.constexpr,
    PREFIX: tl.constexpr,
    CLAMPED: tl.constexpr,
):
    """What some queries of some heads find at a place, (queries, heads): whether there is a key, its weight, what their
    gradient reaches of its value, the gain, and their delta."""
    queries = queries0 * queries1 * queries2
    real = head < heads
    query0 = (spot // queries2 // queries1).to(tl.int32)
    query1 = (spot // queries2 % queries1).to(tl.int32)
    query2 = (spot % queries2).to(tl.int32)
    near = place - prefix
    at0, inside0 = key_on_axis(query0, near // (kernel1 * kernel2), size0, stride0, dilation0, kernel0, CLAMPED)
    at1, inside1 = key_on_axis(query1, near // kernel2 % kernel1, size1, stride1, dilation1, kernel1, CLAMPED)
    at2, inside2 = key_on_axis(query2, near % kernel2, size2, stride2, dilation2, kernel2, CLAMPED)
    key = prefix + (at0 * size1 + at1).to(tl.int64) * size2 + at2
    inside = inside0 & inside1 & inside2
    if PREFIX:
        key = tl.where(near < 0, key * 0 + place, key)
        inside = tl.where(near < 0, key >= 0, inside)
    there = (spot < queries)[:, None] & real[None, :]
    known = there & inside[:, None]
    column = tl.arange(0, BLOCK_D)
    wide = known[:, :, None] & (column < WIDTH)[None, None, :]
    spots = (head[:, None] * q_h + column[None, :] * q_d)[None, :, :]
    rows = tl.load(q + item * q_b + (spot * q_n)[:, None, None] + spots, mask=wide, other=0.0).to(tl.float32)
    spots = (head[:, None] * k_h + column[None, :] * k_d)[None, :, :]
    keys = tl.load(k + item * k_b + (key * k_n)[:, None, None] + spots, mask=wide, other=0.0).to(tl.float32)
    logits = tl.sum(rows * keys, 2) * scale
    if bias is not None:
        bias += item * bias_b + head[None, :] * bias_h + place.to(tl.int64) * bias_p
        if BIAS_VARIES:
            varied = query0.to(tl.int64) * bias_0 + query1.to(tl.int64) * bias_1 + query2.to(tl.int64) * bias_2
            bias += varied[:, None]
        logits += number_at(bias, known, real, BIAS_VARIES)
    if seen is not None:
        shown = tl.load(seen + item * seen_b + head[None, :] * seen_h + key[:, None], mask=known, other=0)
        known = known & (shown != 0)
    first = ((item * heads + head) * queries)[None, :] + spot[:, None]
    base = tl.load(peak + first, mask=known, other=INFINITY)
    base = tl.where(base == -INFINITY, INFINITY, base)
    weights = tl.exp(logits - base) / tl.load(total + first, mask=known, other=1.0)
    average = tl.load(delta + first, mask=known, other=0.0)
    channel = tl.arange(0, BLOCK_V)
    wide = known[:, :, None] & (channel < VALUE_WIDTH)[None, None, :]
    spots = (head[:, None] * grad_out_h + channel[None, :] * grad_out_d)[None, :, :]
    grads = tl.load(grad_out + item * grad_out_b + (spot * grad_out_n)[:, None, None] + spots, mask=wide, other=0.0)
    spots = (head[:, None] * v_h + channel[None, :] * v_d)[None, :, :]
    values = tl.load(v + item * v_b + (key * v_n)[:, None, None] + spots, mask=wide, other=0.0)
    reached = tl.sum(grads.to(tl.float32) * values.to(tl.float32), 2)
    factor = weights * 0.0 + 1.0
    if gain is not None:
        gain += item * gain_b + head[None, :] * gain_h + place.to(tl.int64) * gain_p
        if GAIN_VARIES:
            varied = query0.to(tl.int64) * gain_0 + query1.to(tl.int64) * gain_1 + query2.to(tl.int64) * gain_2
            gain += varied[:, None]
        factor = number_at(gain, known, real, GAIN_VARIES)
    return known, weights, reached, factor, average
