"""The gradient of the queries of token sets: the walk of the forward kernel once more, with the weights made anew."""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.tiles import (
    average_reached,
    denominators,
    placed,
    put_rows,
    rows_at,
    weights_of,
)
from attnkit.kernels.triton.token_sets.forward import logits_of, tile_of
from attnkit.kernels.triton.token_sets.unions import COUNTS, listed, row_bits


@triton.jit(do_not_specialize=COUNTS)
def token_sets_query_gradient(
    grad_q,
    delta,
    row_sums,
    grad_out,
    grad_total,
    q,
    k,
    v,
    out,
    total,
    peak,
    lists,
    words,
    counts,
    order,
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
    bias_b,
    bias_h,
    bias_n,
    bias_k,
    set_b,
    set_h,
    order_b,
    order_h,
    heads,
    tiles,
    queries,
    keys,
    queries_all,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a tile of BLOCK_M queries, and their `delta`, which the other gradients need.

    With weights p and `reached = grad_out . v`, the logits get `p * (reached - delta)`, where `delta` is the average of
    what is reached, which is `grad_out . out`, less what arrives at the sum of powers.

    Args:
        delta: float32 (B, heads, queries), written here.
        row_sums: the same, the sum of what the logits of a query get; or None.
        grad_total: gradient of the sum of powers, or None.
        total: float32 (B, heads, queries) sums of powers, or None without a bias.
        peak: the same for the largest logits; the lse without a bias.
        order: the order of the queries outside the first `queries_all`, or None.
        scale: factor of the logits.
    """
    tile, _, item, head = placed(tiles, 1, heads)
    number = item * set_b + head * set_h
    if order is not None:
        order += item * order_b + head * order_h
    query, count, lists, words = tile_of(
        lists, words, counts, order, number, tile, tiles, queries, keys, queries_all, BLOCK_M
    )
    bits = row_bits(BLOCK_M)
    rows = rows_at(q + item * q_b + head * q_h, query, q_n, q_d, WIDTH, BLOCK_D, True)
    grads = rows_at(
        grad_out + item * grad_out_b + head * grad_out_h, query, grad_out_n, grad_out_d, VALUE_WIDTH, BLOCK_V, True
    )
    means = rows_at(out + item * out_b + head * out_h, query, out_n, out_d, VALUE_WIDTH, BLOCK_V, True)
    first = (item * heads + head) * queries
    peak += first
    if total is not None:
        total += first
    peaks, rest = denominators(total, peak, query, True)
    if grad_total is not None:
        grad_total += item * grad_total_b + head * grad_total_h
    average = average_reached(grads, means, peaks, grad_total, total, query, grad_total_n, True)
    tl.store(delta + first + query, average, mask=query >= 0)
    k += item * k_b + head * k_h
    v += item * v_b + head * v_h
    if bias is not None:
        bias += item * bias_b + head * bias_h
    pulled = tl.zeros((BLOCK_M,), tl.float32)
    grad = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, count, BLOCK_N):
        key, word = listed(lists, words, start, count, BLOCK_N)
        near = rows_at(k, key, k_n, k_d, WIDTH, BLOCK_D, True)
        products = tl.dot(rows, tl.trans(near), input_precision=PRECISION)
        seen = (word[None, :] & bits[:, None]) != 0
        logits = logits_of(products, bias, query[:, None], key[None, :], bias_n, bias_k, seen, scale)
        values = rows_at(v, key, v_n, v_d, VALUE_WIDTH, BLOCK_V, True)
        weights = weights_of(logits, peaks[:, None], rest[:, None], bias is not None)
        reached = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        pull = weights * (reached - average[:, None])
        if row_sums is not None:
            pulled += tl.sum(pull, 1)
        grad = tl.dot(pull.to(near.dtype), near, grad, input_precision=PRECISION)
    if row_sums is not None:
        tl.store(row_sums + first + query, pulled, mask=query >= 0)
    put_rows(grad_q + item * grad_q_b + head * grad_q_h, query, grad_q_n, grad_q_d, grad * scale, WIDTH, BLOCK_D, True)
