"""The gradients of the keys and values of token sets: a tile of keys over the list of queries that see any of them.

Every program writes rows of its own: nothing is added to memory that another program adds to, and the same inputs give
the same bits.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.tiles import denominators, numbers_at, placed, put_rows, rows_at, settled, weights_of
from attnkit.kernels.triton.token_sets.forward import logits_of, tile_of
from attnkit.kernels.triton.token_sets.unions import COUNTS, listed, row_bits


@triton.jit(do_not_specialize=COUNTS)
def token_sets_key_gradient(
    grad_k,
    grad_v,
    column_sums,
    delta,
    grad_out,
    q,
    k,
    v,
    total,
    peak,
    lists,
    words,
    counts,
    order,
    bias,
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
    keys_all,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of BLOCK_M keys and values.

    Args:
        column_sums: float32 (B, heads, keys), the sum of what the logits of a key get, written here; or None.
        delta: float32 (B, heads, queries), from the queries' kernel.
        total: the same for the sums of powers, or None without a bias.
        peak: the same for the largest logits; the lse without a bias.
        lists: queries of the tiles of keys, with their `words` and `counts`.
        order: the order of the keys outside the first `keys_all`, or None.
        scale: factor of the logits.
    """
    tile, _, item, head = placed(tiles, 1, heads)
    number = item * set_b + head * set_h
    if order is not None:
        order += item * order_b + head * order_h
    key, count, lists, words = tile_of(
        lists, words, counts, order, number, tile, tiles, keys, queries, keys_all, BLOCK_M
    )
    bits = row_bits(BLOCK_M)
    near = rows_at(k + item * k_b + head * k_h, key, k_n, k_d, WIDTH, BLOCK_D, True)
    values = rows_at(v + item * v_b + head * v_h, key, v_n, v_d, VALUE_WIDTH, BLOCK_V, True)
    q += item * q_b + head * q_h
    grad_out += item * grad_out_b + head * grad_out_h
    peak += (item * heads + head) * queries
    if total is not None:
        total += (item * heads + head) * queries
    delta += (item * heads + head) * queries
    if bias is not None:
        bias += item * bias_b + head * bias_h
    sum_k = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sum_v = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    pulled = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, count, BLOCK_N):
        query, word = listed(lists, words, start, count, BLOCK_N)
        rows = rows_at(q, query, q_n, q_d, WIDTH, BLOCK_D, True)
        products = tl.dot(near, tl.trans(rows), input_precision=PRECISION)
        seen = (word[None, :] & bits[:, None]) != 0
        logits = logits_of(products, bias, query[None, :], key[:, None], bias_n, bias_k, seen, scale)
        peaks, rest = denominators(total, peak, query, True)
        average = settled(numbers_at(delta, query, 1, 0.0, True))
        weights = weights_of(logits, settled(peaks)[None, :], settled(rest)[None, :], bias is not None)
        grads = rows_at(grad_out, query, grad_out_n, grad_out_d, VALUE_WIDTH, BLOCK_V, True)
        sum_v = tl.dot(weights.to(grads.dtype), grads, sum_v, input_precision=PRECISION)
        reached = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        # Values that nobody sees may be NaN.
        pull = tl.where(seen, weights * (reached - average[None, :]), 0.0)
        if column_sums is not None:
            pulled += tl.sum(pull, 1)
        sum_k = tl.dot(pull.to(rows.dtype), rows, sum_k, input_precision=PRECISION)
    sum_k *= scale
    put_rows(grad_k + item * grad_k_b + head * grad_k_h, key, grad_k_n, grad_k_d, sum_k, WIDTH, BLOCK_D, True)
    put_rows(grad_v + item * grad_v_b + head * grad_v_h, key, grad_v_n, grad_v_d, sum_v, VALUE_WIDTH, BLOCK_V, True)
    if column_sums is not None:
        tl.store(column_sums + (item * heads + head) * keys + key, pulled, mask=key >= 0)
