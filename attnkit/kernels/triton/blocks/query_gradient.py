"""The gradient of the queries of blocks: the walk of the forward kernel once more, with the weights made anew."""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.blocks.products import over_channels
from attnkit.kernels.triton.tiles import (
    COUNTS,
    INFINITY,
    LOG2E,
    average_reached,
    bias_at,
    denominators,
    listed_tokens,
    penalty,
    placed,
    put_rows,
    rows_at,
    tokens_of,
    weights_of,
)


@triton.jit(do_not_specialize=COUNTS)
def blocks_query_gradient(
    grad_q,
    delta,
    grad_out,
    grad_total,
    q,
    k,
    v,
    out,
    total,
    peak,
    query_token,
    key_token,
    index,
    key_mask,
    bias,
    scale,
    grad_q_b,
    grad_q_h,
    grad_q_n,
    grad_q_d,
    grad_out_b,
    grad_out_h,
    grad_out_n,
    grad_out_d,
    grad_total_b,
    grad_total_h,
    grad_total_n,
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
    query_token_b,
    query_token_h,
    key_token_b,
    key_token_h,
    index_b,
    index_h,
    key_mask_b,
    key_mask_h,
    bias_b,
    bias_h,
    bias_r,
    bias_t,
    bias_c,
    heads,
    queries,
    query_blocks,
    query_slots,
    key_slots,
    topk,
    prefix,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DEPTH: tl.constexpr,
    GAPS: tl.constexpr,
    DIRECT: tl.constexpr,
    PREFIX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a tile of BLOCK_M queries, and their `delta`, which the other gradients need.

    With weights p and `reached = grad_out . v`, the logits get `p * (reached - delta)`, where `delta` is the average of
    what is reached, which is `grad_out . out`, less what arrives at the sum of powers.

    Args:
        delta: float32 (B, heads, queries), written here.
        grad_total: gradient of the sum of powers, or None.
        total: float32 (B, heads, queries) sums of powers, or None without a bias.
        peak: the same for the largest logits; the lse without a bias.
        scale: factor of the logits.
        queries: queries outside the prefix, which `grad_out`, `out` and `lse` begin with.
        topk: blocks of keys a block of queries sees, entries of -1 among them; 1 without an index.
        DEPTH: channels that are multiplied at a time, or None, see `over_channels`.
        GAPS: whether a tile of queries may have empty slots.
        DIRECT: whether every tile of BLOCK_N keys falls into one block, without empty slots or a mask.
        PREFIX: whether there is a prefix.
    """
    tile, block, item, head = placed(tl.cdiv(query_slots, BLOCK_M), query_blocks, heads)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = tokens_of(query_token + item * query_token_b + head * query_token_h, block, row, query_slots, GAPS)
    spot = query - prefix
    q = q + item * q_b + head * q_h
    rows = rows_at(q, query, q_n, q_d, WIDTH, BLOCK_D, GAPS)
    grad_out = grad_out + item * grad_out_b + head * grad_out_h
    grads = rows_at(grad_out, spot, grad_out_n, grad_out_d, VALUE_WIDTH, BLOCK_V, GAPS)
    asked, given = (rows, q, query, q_n, q_d), (grads, grad_out, spot, grad_out_n, grad_out_d)
    means = rows_at(out + item * out_b + head * out_h, spot, out_n, out_d, VALUE_WIDTH, BLOCK_V, GAPS)
    peak += (item * heads + head) * queries
    if total is not None:
        total += (item * heads + head) * queries
    peaks, rest = denominators(total, peak, spot, GAPS)
    if grad_total is not None:
        grad_total += item * grad_total_b + head * grad_total_h
    average = average_reached(grads, means, peaks, grad_total, total, spot, grad_total_n, GAPS)
    delta += (item * heads + head) * queries
    if GAPS:
        tl.store(delta + spot, average, mask=spot >= 0)
    else:
        tl.store(delta + spot, average)
    k += item * k_b + head * k_h
    v += item * v_b + head * v_h
    key_token += item * key_token_b + head * key_token_h
    if index is not None:
        index += item * index_b + head * index_h + block * topk
    if key_mask is not None:
        key_mask += item * key_mask_b + head * key_mask_h
    if bias is not None:
        bias += item * bias_b + head * bias_h + block * bias_r
    # With a bias, which may be large, logits are as they are; without one, to base 2.
    unit = scale * LOG2E if bias is None else scale
    BIASED: tl.constexpr = bias is not None
    grad = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # The highest key, or block, that is seen; -1 where none is.
    highest = tl.full((), -1, tl.int64)
    if PREFIX or not DIRECT:
        listed = prefix if DIRECT else prefix + topk * key_slots
        # A prefix is short.
        SOME: tl.constexpr = 16 if DIRECT else BLOCK_N
        met = tl.full((SOME,), -1, tl.int64)
        for start in range(0, listed, SOME):
            column = start + tl.arange(0, SOME)
            key = listed_tokens(column, listed, block, index, key_token, key_mask, prefix, key_slots)
            met = tl.maximum(met, key)
            near = rows_at(k, key, k_n, k_d, WIDTH, BLOCK_D, True)
            logits = over_channels(asked, (near, k, key, k_n, k_d), WIDTH, DEPTH, GAPS, True, PRECISION) * unit
            if bias is not None:
                logits += bias_at(bias, row * bias_t, column * bias_c, query, key, True)
            logits += penalty(key)
            values = rows_at(v, key, v_n, v_d, VALUE_WIDTH, BLOCK_V, True)
            weights = weights_of(logits, peaks[:, None], rest[:, None], BIASED)
            taken = (values, v, key, v_n, v_d)
            reached = over_channels(given, taken, VALUE_WIDTH, DEPTH, GAPS, True, PRECISION)
            grad = _pulled(weights, reached, average, near, grad, PRECISION)
        highest = tl.max(met, 0)
    if DIRECT:
        SOME_MISS: tl.constexpr = index is not None
        for visit in range(topk * (key_slots // BLOCK_N)):
            place = visit * BLOCK_N // key_slots
            column = visit * BLOCK_N + tl.arange(0, BLOCK_N)
            slot = column - place * key_slots
            if index is not None:
                found = tl.load(index + place)
                # Rows of zeros where there is no block, so that these logits, which do not count, are finite.
                key = tl.load(key_token + tl.where(found >= 0, found, 0) * key_slots + slot)
                key = tl.where(found >= 0, key, -1)
                unseen = tl.where(found >= 0, 0.0, INFINITY)
                highest = tl.maximum(highest, found)
            else:
                key = tl.load(key_token + block * key_slots + slot)
                unseen = 0.0
            near = rows_at(k, key, k_n, k_d, WIDTH, BLOCK_D, SOME_MISS)
            logits = over_channels(asked, (near, k, key, k_n, k_d), WIDTH, DEPTH, GAPS, SOME_MISS, PRECISION) * unit
            if bias is not None:
                SOME_GAPS: tl.constexpr = GAPS or SOME_MISS
                logits += bias_at(bias, row * bias_t, (prefix + column) * bias_c, query, key, SOME_GAPS)
            values = rows_at(v, key, v_n, v_d, VALUE_WIDTH, BLOCK_V, SOME_MISS)
            weights = weights_of(logits, (peaks + unseen)[:, None], rest[:, None], BIASED)
            taken = (values, v, key, v_n, v_d)
            reached = over_channels(given, taken, VALUE_WIDTH, DEPTH, GAPS, SOME_MISS, PRECISION)
            grad = _pulled(weights, reached, average, near, grad, PRECISION)
    if index is not None or not DIRECT:
        # Queries that see nothing may be NaN.
        grad = tl.where(highest >= 0, grad, 0.0)
    put_rows(grad_q + item * grad_q_b + head * grad_q_h, query, grad_q_n, grad_q_d, grad * scale, WIDTH, BLOCK_D, GAPS)


@triton.jit
def _pulled(weights, reached, average, near, grad, PRECISION: tl.constexpr):
    """The queries' gradient before it is scaled, with a tile of keys more."""
    pull = weights * (reached - average[:, None])
    return tl.dot(pull.to(near.dtype), near, grad, input_precision=PRECISION)
