"""Gradients of what many blocks share: prefix keys, which every query sees, and a bias that broadcasts.

Each program adds up a share of those who see, in a fixed order, and writes a sum of its own; the sums are added up
afterwards. Nothing is added to memory that another program adds to.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.blocks.products import over_channels
from attnkit.kernels.triton.tiles import (
    COUNTS,
    LOG2E,
    bias_at,
    denominators,
    listed_tokens,
    numbers_at,
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
def blocks_prefix_gradient(
    sum_k,
    sum_v,
    delta,
    grad_out,
    q,
    k,
    v,
    total,
    peak,
    query_slot,
    key_mask,
    bias,
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
    query_slot_b,
    query_slot_h,
    key_mask_b,
    key_mask_h,
    bias_b,
    bias_h,
    bias_r,
    bias_t,
    bias_c,
    pairs,
    heads,
    queries,
    query_slots,
    prefix,
    share,
    shares,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a share of the queries gives to a tile of BLOCK_N prefix keys and values.

    Args:
        sum_k: float32 (shares, B, heads, prefix, WIDTH).
        sum_v: the same for values.
        share: queries of a share, a multiple of BLOCK_M.
    """
    tile, number, item, head = placed(tl.cdiv(prefix, BLOCK_N), shares, heads)
    key = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    key = tl.where(key < prefix, key, -1)
    seen = key
    if key_mask is not None:
        shown = tl.load(key_mask + item * key_mask_b + head * key_mask_h + key, mask=key >= 0, other=0)
        seen = tl.where(shown != 0, key, -1)
    near = rows_at(k + item * k_b + head * k_h, seen, k_n, k_d, WIDTH, BLOCK_D, True)
    values = rows_at(v + item * v_b + head * v_h, seen, v_n, v_d, VALUE_WIDTH, BLOCK_V, True)
    q += item * q_b + head * q_h + prefix * q_n
    grad_out += item * grad_out_b + head * grad_out_h
    peak += (item * heads + head) * queries
    if total is not None:
        total += (item * heads + head) * queries
    delta += (item * heads + head) * queries
    query_slot += item * query_slot_b + head * query_slot_h
    if bias is not None:
        bias += item * bias_b + head * bias_h
    # With a bias, which may be large, logits are as they are; without one, to base 2.
    unit = scale * LOG2E if bias is None else scale
    gained_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    gained_v = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for first in range(0, share, BLOCK_M):
        spot = number * share + first + tl.arange(0, BLOCK_M)
        spot = tl.where(spot < queries, spot, -1)
        rows = rows_at(q, spot, q_n, q_d, WIDTH, BLOCK_D, True)
        logits = tl.dot(near, tl.trans(rows), input_precision=PRECISION) * unit
        if bias is not None:
            slot = tl.load(query_slot + spot, mask=spot >= 0, other=0)
            block = slot // query_slots
            added = bias + block * bias_r + (slot - block * query_slots) * bias_t
            logits += turned_bias_at(added, key * bias_c, spot, seen, True)
        peaks, rest = denominators(total, peak, spot, True)
        average = settled(numbers_at(delta, spot, 1, 0.0, True))
        grads = rows_at(grad_out, spot, grad_out_n, grad_out_d, VALUE_WIDTH, BLOCK_V, True)
        weights = weights_of(logits, settled(peaks)[None, :], settled(rest)[None, :], bias is not None)
        gained_v = tl.dot(weights.to(grads.dtype), grads, gained_v, input_precision=PRECISION)
        pull = weights * (tl.dot(values, tl.trans(grads), input_precision=PRECISION) - average[None, :])
        gained_k = tl.dot(pull.to(rows.dtype), rows, gained_k, input_precision=PRECISION)
    gained_k = tl.where((seen >= 0)[:, None], gained_k * scale, 0.0)
    gained_v = tl.where((seen >= 0)[:, None], gained_v, 0.0)
    at = (number * pairs + item * heads + head) * prefix
    put_rows(sum_k + at * WIDTH, key, WIDTH, 1, gained_k, WIDTH, BLOCK_D, True)
    put_rows(sum_v + at * VALUE_WIDTH, key, VALUE_WIDTH, 1, gained_v, VALUE_WIDTH, BLOCK_V, True)


@triton.jit(do_not_specialize=COUNTS)
def blocks_bias_gradient(
    sums,
    delta,
    grad_out,
    q,
    k,
    v,
    total,
    peak,
    query_token,
    key_token,
    index,
    key_mask,
    bias,
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
    query_slots,
    key_slots,
    topk,
    prefix,
    bias_heads,
    bias_blocks,
    shared_heads,
    shared_blocks,
    shared,
    share,
    rows_of_bias,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a share of the blocks that share a part of the bias gives to a tile (BLOCK_M, BLOCK_N) of it.

    Args:
        sums: float32 (shares, items, heads, blocks, query_slots, columns), all but the first as the bias has them.
        bias_heads: heads the bias has.
        bias_blocks: blocks the bias has.
        shared_heads: heads over which it broadcasts; 1 where it has all.
        shared_blocks: blocks over which it broadcasts; 1 where it has all.
        shared: blocks of all heads and items that share a part of the bias.
        share: how many of them belong to a program.
        rows_of_bias: number of its parts: items * heads * blocks.
        DEPTH: channels that are multiplied at a time, or None, see `over_channels`.
    """
    listed = prefix + topk * key_slots
    across = tl.cdiv(listed, BLOCK_N)
    tile, part, number, _ = placed(tl.cdiv(query_slots, BLOCK_M) * across, rows_of_bias, 1)
    row = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    bias_block = part % bias_blocks
    bias_head = part // bias_blocks % bias_heads
    bias_item = part // (bias_blocks * bias_heads)
    gained = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(number * share, tl.minimum((number + 1) * share, shared)):
        # The counters of what is not shared stand still.
        block = bias_block + at % shared_blocks
        head = bias_head + at // shared_blocks % shared_heads
        item = bias_item + at // (shared_blocks * shared_heads)
        query = tokens_of(query_token + item * query_token_b + head * query_token_h, block, row, query_slots, True)
        own = None
        if index is not None:
            own = index + item * index_b + head * index_h + block * topk
        hidden = None
        if key_mask is not None:
            hidden = key_mask + item * key_mask_b + head * key_mask_h
        keys = key_token + item * key_token_b + head * key_token_h
        key = listed_tokens(column, listed, block, own, keys, hidden, prefix, key_slots)
        spot = query - prefix
        q_own = q + item * q_b + head * q_h
        rows = rows_at(q_own, query, q_n, q_d, WIDTH, BLOCK_D, True)
        k_own = k + item * k_b + head * k_h
        near = rows_at(k_own, key, k_n, k_d, WIDTH, BLOCK_D, True)
        asked, seen = (rows, q_own, query, q_n, q_d), (near, k_own, key, k_n, k_d)
        logits = over_channels(asked, seen, WIDTH, DEPTH, True, True, PRECISION) * scale
        added = bias + item * bias_b + head * bias_h + block * bias_r
        hidden = penalty(key)
        logits += bias_at(added, row * bias_t, column * bias_c, query, key, True) + hidden
        first = (item * heads + head) * queries
        peaks, rest = denominators(total + first, peak + first, spot, True)
        average = numbers_at(delta + first, spot, 1, 0.0, True)
        grad_own = grad_out + item * grad_out_b + head * grad_out_h
        grads = rows_at(grad_own, spot, grad_out_n, grad_out_d, VALUE_WIDTH, BLOCK_V, True)
        v_own = v + item * v_b + head * v_h
        values = rows_at(v_own, key, v_n, v_d, VALUE_WIDTH, BLOCK_V, True)
        given, taken = (grads, grad_own, spot, grad_out_n, grad_out_d), (values, v_own, key, v_n, v_d)
        reached = over_channels(given, taken, VALUE_WIDTH, DEPTH, True, True, PRECISION)
        weights = weights_of(logits, peaks[:, None], rest[:, None], True)
        pull = weights * (reached - average[:, None])
        # Keys of which only an empty slot could tell, and queries that see nothing, may be NaN.
        gained += tl.where((query >= 0)[:, None] & (hidden == 0.0), pull, 0.0)
    spots = ((number * rows_of_bias + part) * query_slots + row[:, None]) * listed + column[None, :]
    tl.store(sums + spots, gained, mask=(row < query_slots)[:, None] & (column < listed)[None, :])
