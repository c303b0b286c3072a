"""The gradients of blocks that see themselves and fit into one tile, such as windows: all three by one program a block.

Nobody else sees a block's keys, so its queries' tile tells all: each row is read once, where the kernels for an index
read it twice and make the weights twice.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

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
    settled,
    tokens_of,
    turned_bias_at,
    weights_of,
)


@triton.jit(do_not_specialize=COUNTS)
def blocks_window_gradient(
    grad_q,
    grad_k,
    grad_v,
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
    key_mask,
    bias,
    scale,
    grad_q_b,
    grad_q_h,
    grad_q_n,
    grad_q_d,
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
    prefix,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GAPS: tl.constexpr,
    KEY_GAPS: tl.constexpr,
    PREFIX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a block's queries, keys and values, and the queries' `delta`; see `blocks_query_gradient`.

    Args:
        GAPS: whether some of the BLOCK_M slots of queries may be empty.
        KEY_GAPS: whether some of the BLOCK_N slots of keys may be empty or hidden.
        PREFIX: whether there is a prefix; the gradients of its keys are made elsewhere.
    """
    _, block, item, head = placed(1, query_blocks, heads)
    row = tl.arange(0, BLOCK_M)
    query = tokens_of(query_token + item * query_token_b + head * query_token_h, block, row, query_slots, GAPS)
    spot = query - prefix
    rows = rows_at(q + item * q_b + head * q_h, query, q_n, q_d, WIDTH, BLOCK_D, GAPS)
    grad_out += item * grad_out_b + head * grad_out_h
    grads = rows_at(grad_out, spot, grad_out_n, grad_out_d, VALUE_WIDTH, BLOCK_V, GAPS)
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
    slot = tl.arange(0, BLOCK_N)
    key = tokens_of(key_token + item * key_token_b + head * key_token_h, block, slot, key_slots, KEY_GAPS)
    seen = key
    if key_mask is not None:
        key_mask += item * key_mask_b + head * key_mask_h
        shown = tl.load(key_mask + key, mask=key >= 0, other=0)
        seen = tl.where(shown != 0, key, -1)
    k += item * k_b + head * k_h
    v += item * v_b + head * v_h
    near = rows_at(k, seen, k_n, k_d, WIDTH, BLOCK_D, KEY_GAPS)
    values = rows_at(v, seen, v_n, v_d, VALUE_WIDTH, BLOCK_V, KEY_GAPS)
    # With a bias, which may be large, logits are as they are; without one, to base 2.
    unit = scale * LOG2E if bias is None else scale
    BIASED: tl.constexpr = bias is not None
    # Keys by queries, so that the weights need not be turned for the gradients of keys and values.
    logits = tl.dot(near, tl.trans(rows), input_precision=PRECISION) * unit
    if bias is not None:
        bias += item * bias_b + head * bias_h + block * bias_r
        SOME_GAPS: tl.constexpr = GAPS or KEY_GAPS
        logits += turned_bias_at(bias + row * bias_t, (prefix + slot) * bias_c, query, seen, SOME_GAPS)
    if KEY_GAPS:
        logits += tl.where(seen >= 0, 0.0, -INFINITY)[:, None]
    weights = weights_of(logits, settled(peaks)[None, :], settled(rest)[None, :], BIASED)
    sum_v = tl.dot(weights.to(grads.dtype), grads, input_precision=PRECISION)
    reached = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
    pull = (weights * (reached - settled(average)[None, :])).to(rows.dtype)
    sum_k = tl.dot(pull, rows, input_precision=PRECISION) * scale
    grad = tl.dot(tl.trans(pull), near, input_precision=PRECISION)
    highest = tl.max(seen, 0)
    if PREFIX:
        for start in range(0, prefix, 16):
            column = start + tl.arange(0, 16)
            shared = listed_tokens(column, prefix, block, None, key_token, key_mask, prefix, key_slots)
            highest = tl.maximum(highest, tl.max(shared, 0))
            shared_k = rows_at(k, shared, k_n, k_d, WIDTH, BLOCK_D, True)
            shared_v = rows_at(v, shared, v_n, v_d, VALUE_WIDTH, BLOCK_V, True)
            turned = tl.dot(rows, tl.trans(shared_k), input_precision=PRECISION) * unit
            if bias is not None:
                turned += bias_at(bias, row * bias_t, column * bias_c, query, shared, True)
            powers = weights_of(turned + penalty(shared), peaks[:, None], rest[:, None], BIASED)
            gains = tl.dot(grads, tl.trans(shared_v), input_precision=PRECISION) - average[:, None]
            grad = tl.dot((powers * gains).to(rows.dtype), shared_k, grad, input_precision=PRECISION)
    if KEY_GAPS:
        # Queries that see nothing may be NaN.
        grad = tl.where(highest >= 0, grad, 0.0)
    put_rows(grad_q + item * grad_q_b + head * grad_q_h, query, grad_q_n, grad_q_d, grad * scale, WIDTH, BLOCK_D, GAPS)
    if KEY_GAPS:
        sum_k = tl.where((seen >= 0)[:, None], sum_k, 0.0)
        sum_v = tl.where((seen >= 0)[:, None], sum_v, 0.0)
    if GAPS:
        # Keys of which only empty slots could tell may be NaN.
        told = tl.max(query, 0) >= 0
        sum_k = tl.where(told, sum_k, 0.0)
        sum_v = tl.where(told, sum_v, 0.0)
    put_rows(grad_k + item * grad_k_b + head * grad_k_h, key, grad_k_n, grad_k_d, sum_k, WIDTH, BLOCK_D, KEY_GAPS)
    put_rows(grad_v + item * grad_v_b + head * grad_v_h, key, grad_v_n, grad_v_d, sum_v, VALUE_WIDTH, BLOCK_V, KEY_GAPS)
