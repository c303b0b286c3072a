"""The gradient of a bias that has a number for each pair: a tile of queries adds what its pairs get.

Items and heads that share a bias come in launches one after another, so that a number of it is added to by one program
at a time and always in the same order.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.tiles import numbers_at, placed, rows_at
from attnkit.kernels.triton.token_sets.forward import logits_of, raised, tile_of
from attnkit.kernels.triton.token_sets.unions import COUNTS, listed, row_bits


@triton.jit(do_not_specialize=COUNTS)
def token_sets_bias_gradient(
    grad_bias,
    peaks,
    shares,
    delta,
    grad_out,
    q,
    k,
    v,
    lists,
    words,
    counts,
    bias,
    scale,
    grad_bias_b,
    grad_bias_h,
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
    heads,
    tiles,
    queries,
    keys,
    queries_all,
    first_item,
    first_head,
    own_heads,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what the logits of a tile of BLOCK_M queries get.

    Args:
        grad_bias: float32 (B or 1, heads or 1, queries, keys).
        peaks: numbers of the queries, as the queries' kernel leaves them, like `shares` and `delta`.
        lists: keys of the tiles, with their `words` and `counts`.
        first_item: the launch's items begin here.
        first_head: its heads begin here, and are `own_heads`.
    """
    tile, _, item, head = placed(tiles, 1, own_heads)
    item += first_item
    head += first_head
    number = item * set_b + head * set_h
    query, count, lists, words = tile_of(lists, words, counts, number, tile, tiles, queries, keys, queries_all, BLOCK_M)
    bits = row_bits(BLOCK_M)
    rows = rows_at(q + item * q_b + head * q_h, query, q_n, q_d, WIDTH, BLOCK_D, True)
    grads = rows_at(
        grad_out + item * grad_out_b + head * grad_out_h, query, grad_out_n, grad_out_d, VALUE_WIDTH, BLOCK_V, True
    )
    k += item * k_b + head * k_h
    v += item * v_b + head * v_h
    bias += item * bias_b + head * bias_h
    grad_bias += item * grad_bias_b + head * grad_bias_h
    spot = (item * heads + head) * queries + query
    peak, share, average = (
        numbers_at(peaks, spot, 1, 0.0, True),
        numbers_at(shares, spot, 1, 0.0, True),
        numbers_at(delta, spot, 1, 0.0, True),
    )
    for start in range(0, count, BLOCK_N):
        key, word = listed(lists, words, start, count, BLOCK_N)
        near = rows_at(k, key, k_n, k_d, WIDTH, BLOCK_D, True)
        products = tl.dot(rows, tl.trans(near), input_precision=PRECISION)
        seen = (word[None, :] & bits[:, None]) != 0
        logits = logits_of(products, bias, query[:, None], key[None, :], bias_n, bias_k, seen, scale)
        values = rows_at(v, key, v_n, v_d, VALUE_WIDTH, BLOCK_V, True)
        reached = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        weights = raised(logits - peak[:, None], True) * share[:, None]
        spots = grad_bias + query[:, None] * keys + key[None, :]
        before = tl.load(spots, mask=seen, other=0.0)
        tl.store(spots, before + weights * (reached - average[:, None]), mask=seen)
