"""The gradient of a bias that has a number for each pair: a tile of queries adds what its pairs get.

A program goes over the items and heads that share a bias, so that a number of it is added to by one program, and always
in the same order.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.tiles import denominators, numbers_at, placed, rows_at, weights_of
from attnkit.kernels.triton.token_sets.forward import logits_of, tile_of
from attnkit.kernels.triton.token_sets.unions import COUNTS, listed, row_bits


@triton.jit(do_not_specialize=COUNTS)
def token_sets_bias_gradient(
    grad_bias,
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
    order_b,
    order_h,
    heads,
    tiles,
    queries,
    keys,
    queries_all,
    own_heads,
    shared_items,
    shared_heads,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the logits of a tile of BLOCK_M queries get, in all items and heads that share a bias.

    Args:
        grad_bias: float32 (B or 1, heads or 1, queries, keys), 0 before.
        delta: float32 (B, heads, queries), from the queries' kernel.
        total: the same for the sums of powers.
        peak: the same for the largest logits.
        lists: keys of the tiles, with their `words` and `counts`.
        order: the order of the queries outside the first `queries_all`, one for all that share a bias; or None.
        own_heads: heads the bias has.
        shared_items: items over which it broadcasts; 1 where it has all.
        shared_heads: heads over which it broadcasts; 1 where it has all.
    """
    tile, _, own_item, own_head = placed(tiles, 1, own_heads)
    bits = row_bits(BLOCK_M)
    grad_bias += own_item * grad_bias_b + own_head * grad_bias_h
    if order is not None:
        order += own_item * order_b + own_head * order_h
    for at in range(shared_items * shared_heads):
        # The counters of what is not shared stand still.
        item, head = own_item + at // shared_heads, own_head + at % shared_heads
        number = item * set_b + head * set_h
        query, count, keys_listed, words_listed = tile_of(
            lists, words, counts, order, number, tile, tiles, queries, keys, queries_all, BLOCK_M
        )
        rows = rows_at(q + item * q_b + head * q_h, query, q_n, q_d, WIDTH, BLOCK_D, True)
        theirs = grad_out + item * grad_out_b + head * grad_out_h
        grads = rows_at(theirs, query, grad_out_n, grad_out_d, VALUE_WIDTH, BLOCK_V, True)
        first = (item * heads + head) * queries
        peaks, rest = denominators(total + first, peak + first, query, True)
        average = numbers_at(delta + first, query, 1, 0.0, True)
        for start in range(0, count, BLOCK_N):
            key, word = listed(keys_listed, words_listed, start, count, BLOCK_N)
            near = rows_at(k + item * k_b + head * k_h, key, k_n, k_d, WIDTH, BLOCK_D, True)
            products = tl.dot(rows, tl.trans(near), input_precision=PRECISION)
            seen = (word[None, :] & bits[:, None]) != 0
            added = bias + item * bias_b + head * bias_h
            logits = logits_of(products, added, query[:, None], key[None, :], bias_n, bias_k, seen, scale)
            values = rows_at(v + item * v_b + head * v_h, key, v_n, v_d, VALUE_WIDTH, BLOCK_V, True)
            reached = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            weights = weights_of(logits, peaks[:, None], rest[:, None], True)
            spots = grad_bias + query[:, None] * keys + key[None, :]
            before = tl.load(spots, mask=seen, other=0.0)
            tl.store(spots, before + weights * (reached - average[:, None]), mask=seen)
        # Other threads of the program may read what was written for the next item or head.
        tl.debug_barrier()
