"""The gradient of the queries of token sets: the walk of the forward kernel once more, weights by online softmax too.

Made anew instead of taken from the lse, weights are right where a bias is so large that its sum with the logarithm of
the denominator has lost the latter.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.tiles import INFINITY, numbers_at, placed, put_rows, rows_at
from attnkit.kernels.triton.token_sets.forward import logits_of, step, tile_of
from attnkit.kernels.triton.token_sets.unions import COUNTS, listed, row_bits


@triton.jit(do_not_specialize=COUNTS)
def token_sets_query_gradient(
    grad_q,
    peaks,
    shares,
    delta,
    row_sums,
    grad_out,
    grad_lse,
    q,
    k,
    v,
    out,
    lse,
    lists,
    words,
    counts,
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
    grad_lse_b,
    grad_lse_h,
    grad_lse_n,
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
    """Gradient of a tile of BLOCK_M queries, and three numbers of each, which the other gradients need.

    With weights p and `reached = grad_out . v`, the logits get `p * (reached - delta)`, where `delta` is the average of
    what is reached, which is `grad_out . out`, less what arrives at the lse.

    Args:
        peaks: float32 (B, heads, queries), the largest logits, finite everywhere, written here; with them
            `p = exp(logit - peak) * share`.
        shares: the same, one over the sum of powers, 0 for queries that see nothing.
        delta: the same.
        row_sums: the same, the sum of what the logits of a query get; or None.
        grad_lse: gradient of the lse, or None.
        scale: factor of the logits.
    """
    tile, _, item, head = placed(tiles, 1, heads)
    number = item * set_b + head * set_h
    query, count, lists, words = tile_of(lists, words, counts, number, tile, tiles, queries, keys, queries_all, BLOCK_M)
    bits = row_bits(BLOCK_M)
    rows = rows_at(q + item * q_b + head * q_h, query, q_n, q_d, WIDTH, BLOCK_D, True)
    grads = rows_at(
        grad_out + item * grad_out_b + head * grad_out_h, query, grad_out_n, grad_out_d, VALUE_WIDTH, BLOCK_V, True
    )
    means = rows_at(out + item * out_b + head * out_h, query, out_n, out_d, VALUE_WIDTH, BLOCK_V, True)
    average = tl.sum(grads.to(tl.float32) * means.to(tl.float32), 1)
    spot = (item * heads + head) * queries + query
    if grad_lse is not None:
        # What arrives at -infinity goes nowhere.
        blind = tl.load(lse + spot, mask=query >= 0, other=0.0) == -INFINITY
        arrived = numbers_at(grad_lse + item * grad_lse_b + head * grad_lse_h, query, grad_lse_n, 0.0, True)
        average -= tl.where(blind, 0.0, arrived)
    k += item * k_b + head * k_h
    v += item * v_b + head * v_h
    if bias is not None:
        bias += item * bias_b + head * bias_h
    peak = tl.full((BLOCK_M,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    pulled = tl.zeros((BLOCK_M,), tl.float32)
    grad = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, count, BLOCK_N):
        key, word = listed(lists, words, start, count, BLOCK_N)
        near = rows_at(k, key, k_n, k_d, WIDTH, BLOCK_D, True)
        products = tl.dot(rows, tl.trans(near), input_precision=PRECISION)
        seen = (word[None, :] & bits[:, None]) != 0
        logits = logits_of(products, bias, query[:, None], key[None, :], bias_n, bias_k, seen, scale)
        values = rows_at(v, key, v_n, v_d, VALUE_WIDTH, BLOCK_V, True)
        weights, kept, peak, total = step(logits, peak, total, bias is not None)
        reached = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        pull = weights * (reached - average[:, None])
        if row_sums is not None:
            pulled = pulled * kept + tl.sum(pull, 1)
        grad = tl.dot(pull.to(near.dtype), near, grad * kept[:, None], input_precision=PRECISION)
    share = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    tl.store(peaks + spot, tl.where(total == 0.0, 0.0, peak), mask=query >= 0)
    tl.store(shares + spot, share, mask=query >= 0)
    tl.store(delta + spot, average, mask=query >= 0)
    if row_sums is not None:
        tl.store(row_sums + spot, pulled * share, mask=query >= 0)
    grad *= (share * scale)[:, None]
    put_rows(grad_q + item * grad_q_b + head * grad_q_h, query, grad_q_n, grad_q_d, grad, WIDTH, BLOCK_D, True)
