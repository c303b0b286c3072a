"""The gradients of the keys and values of blocks: a tile of a block's keys over all queries that see it.

Who sees a block of keys stands in the inverse of the index (`attnkit.kernels.triton.blocks.inverse`). The row of a
block that many see is cut into pieces, whose sums a second kernel adds up in their order: nothing is added to memory
that another program adds to, and the same inputs give the same bits.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.blocks.products import over_channels
from attnkit.kernels.triton.tiles import (
    COUNTS,
    LOG2E,
    denominators,
    numbers_at,
    placed,
    put_rows,
    rows_at,
    settled,
    tokens_of,
    turned_bias_at,
    weights_of,
)


@triton.jit(do_not_specialize=COUNTS)
def blocks_key_gradient(
    grad_k,
    grad_v,
    part_k,
    part_v,
    delta,
    grad_out,
    q,
    k,
    v,
    total,
    peak,
    query_token,
    key_token,
    key_mask,
    bias,
    entry,
    start,
    piece_block,
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
    table_b,
    table_h,
    heads,
    queries,
    entries,
    pieces,
    parts,
    share,
    key_blocks,
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
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of BLOCK_N keys and values, or a piece's share of them.

    Args:
        part_k: float32 (B, heads, parts, key_slots, WIDTH) for the pieces of blocks that have several.
        part_v: the same for values.
        delta: float32 (B, heads, queries), from the queries' kernel.
        total: float32 (B, heads, queries) sums of powers, or None without a bias.
        peak: the same for the largest logits; the lse without a bias.
        entry: the inverse's tables, or None where every block sees itself.
        table_b: which of the inverse's tables belongs to an item and head: item * table_b + head * table_h.
        entries: numbers in a table of entries.
        pieces: numbers of pieces of a table, which is how many programs there are for a tile, item and head.
        parts: pieces that `part_k` has room for.
        share: entries of a piece at least, where a block has several.
        DEPTH: channels that are multiplied at a time, or None, see `over_channels`.
        GAPS: whether a tile of keys may have slots that are empty or hidden.
        DIRECT: whether every tile of BLOCK_M queries falls into one block, without empty slots.
    """
    tile, piece, item, head = placed(tl.cdiv(key_slots, BLOCK_N), pieces, heads)
    table = item * table_b + head * table_h
    block, begin, end, cuts, part, number = piece, 0, 1, 1, 0, 0
    if entry is not None:
        block = tl.load(piece_block + table * pieces + piece)
        if block >= key_blocks:
            # Behind the last piece.
            return
        begin, end, cuts = row_of(start + table * (key_blocks + 1), block, share)
        part = begin // share
        number = (piece - block).to(tl.int32) - part
        if (number < 0) | (number >= cuts):
            # No block has a piece of that number.
            return
        size = tl.cdiv(end - begin, cuts)
        begin += number * size
        end = tl.minimum(begin + size, end)
        entry += table * entries
    slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    key_token += item * key_token_b + head * key_token_h
    key = tokens_of(key_token, block, slot, key_slots, GAPS)
    seen = key
    if key_mask is not None:
        shown = tl.load(key_mask + item * key_mask_b + head * key_mask_h + key, mask=key >= 0, other=0)
        seen = tl.where(shown != 0, key, -1)
    k = k + item * k_b + head * k_h
    near = rows_at(k, seen, k_n, k_d, WIDTH, BLOCK_D, GAPS)
    v = v + item * v_b + head * v_h
    values = rows_at(v, seen, v_n, v_d, VALUE_WIDTH, BLOCK_V, GAPS)
    held_k, held_v = (near, k, seen, k_n, k_d), (values, v, seen, v_n, v_d)
    q += item * q_b + head * q_h
    # These begin with the first query outside the prefix.
    grad_out += item * grad_out_b + head * grad_out_h
    peak += (item * heads + head) * queries
    if total is not None:
        total += (item * heads + head) * queries
    delta += (item * heads + head) * queries
    query_token += item * query_token_b + head * query_token_h
    if bias is not None:
        bias += item * bias_b + head * bias_h
    # With a bias, which may be large, logits are as they are; without one, to base 2.
    unit = scale * LOG2E if bias is None else scale
    BIASED: tl.constexpr = bias is not None
    sum_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_v = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if DIRECT:
        for visit in range((end - begin) * (query_slots // BLOCK_M)):
            place = visit * BLOCK_M // query_slots
            row = visit * BLOCK_M - place * query_slots + tl.arange(0, BLOCK_M)
            at = block.to(tl.int32)
            if entry is not None:
                at = tl.load(entry + begin + place).to(tl.int32)
            query = tl.load(query_token + at // topk * query_slots + row)
            spot = query - prefix
            rows = rows_at(q, query, q_n, q_d, WIDTH, BLOCK_D, False)
            logits = over_channels(held_k, (rows, q, query, q_n, q_d), WIDTH, DEPTH, GAPS, False, PRECISION) * unit
            if bias is not None:
                added = bias + (at // topk).to(tl.int64) * bias_r + row * bias_t
                column = (prefix + at % topk * key_slots + slot) * bias_c
                logits += turned_bias_at(added, column, query, seen, GAPS)
            weights = _weights(logits, total, peak, spot, BIASED, False)
            average = numbers_at(delta, spot, 1, 0.0, False)
            grads = rows_at(grad_out, spot, grad_out_n, grad_out_d, VALUE_WIDTH, BLOCK_V, False)
            given = (grads, grad_out, spot, grad_out_n, grad_out_d)
            sum_v = tl.dot(weights.to(grads.dtype), grads, sum_v, input_precision=PRECISION)
            reached = over_channels(held_v, given, VALUE_WIDTH, DEPTH, GAPS, False, PRECISION)
            sum_k = _pulled(weights, reached, average, rows, sum_k, PRECISION)
    else:
        listed = (end - begin) * query_slots
        told = tl.full((BLOCK_M,), -1, tl.int64)
        for first in range(0, listed, BLOCK_M):
            line = first + tl.arange(0, BLOCK_M)
            place = line // query_slots
            row = line - place * query_slots
            at = tl.zeros((BLOCK_M,), tl.int32) + block.to(tl.int32)
            if entry is not None:
                at = tl.load(entry + begin + place, mask=line < listed, other=0).to(tl.int32)
            query = tl.load(query_token + at // topk * query_slots + row, mask=line < listed, other=-1)
            spot = query - prefix
            rows = rows_at(q, query, q_n, q_d, WIDTH, BLOCK_D, True)
            logits = over_channels(held_k, (rows, q, query, q_n, q_d), WIDTH, DEPTH, GAPS, True, PRECISION) * unit
            if bias is not None:
                added = bias + (at // topk).to(tl.int64) * bias_r + row * bias_t
                column = (prefix + slot) * bias_c
                logits += turned_bias_at(added + at % topk * key_slots * bias_c, column, query, seen, True)
            weights = _weights(logits, total, peak, spot, BIASED, True)
            average = numbers_at(delta, spot, 1, 0.0, True)
            grads = rows_at(grad_out, spot, grad_out_n, grad_out_d, VALUE_WIDTH, BLOCK_V, True)
            given = (grads, grad_out, spot, grad_out_n, grad_out_d)
            sum_v = tl.dot(weights.to(grads.dtype), grads, sum_v, input_precision=PRECISION)
            reached = over_channels(held_v, given, VALUE_WIDTH, DEPTH, GAPS, True, PRECISION)
            sum_k = _pulled(weights, reached, average, rows, sum_k, PRECISION)
            told = tl.maximum(told, query)
        # Keys of which only empty slots could tell may be NaN.
        sum_k = tl.where(tl.max(told, 0) >= 0, sum_k, 0.0)
        sum_v = tl.where(tl.max(told, 0) >= 0, sum_v, 0.0)
    sum_k *= scale
    if GAPS:
        sum_k = tl.where((seen >= 0)[:, None], sum_k, 0.0)
        sum_v = tl.where((seen >= 0)[:, None], sum_v, 0.0)
    if entry is not None:  # noqa: SIM102 (settled when the kernel is compiled)
        if cuts > 1:
            target = (item * heads + head) * parts + part + number
            held = tl.where(slot < key_slots, slot, -1).to(tl.int64)
            put_rows(part_k + target * key_slots * WIDTH, held, WIDTH, 1, sum_k, WIDTH, BLOCK_D, True)
            put_rows(part_v + target * key_slots * VALUE_WIDTH, held, VALUE_WIDTH, 1, sum_v, VALUE_WIDTH, BLOCK_V, True)
            return
    put_rows(grad_k + item * grad_k_b + head * grad_k_h, key, grad_k_n, grad_k_d, sum_k, WIDTH, BLOCK_D, GAPS)
    put_rows(grad_v + item * grad_v_b + head * grad_v_h, key, grad_v_n, grad_v_d, sum_v, VALUE_WIDTH, BLOCK_V, GAPS)


@triton.jit(do_not_specialize=COUNTS)
def blocks_key_parts(
    grad_k,
    grad_v,
    part_k,
    part_v,
    key_token,
    start,
    grad_k_b,
    grad_k_h,
    grad_k_n,
    grad_k_d,
    grad_v_b,
    grad_v_h,
    grad_v_n,
    grad_v_d,
    key_token_b,
    key_token_h,
    table_b,
    table_h,
    heads,
    parts,
    share,
    key_blocks,
    key_slots,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Adds up the sums of the pieces of a block of keys, in their order; blocks in one piece have their gradients."""
    tile, block, item, head = placed(tl.cdiv(key_slots, BLOCK_N), key_blocks, heads)
    table = item * table_b + head * table_h
    begin, _, cuts = row_of(start + table * (key_blocks + 1), block, share)
    if cuts == 1:
        return
    slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    held = tl.where(slot < key_slots, slot, -1).to(tl.int64)
    key = tokens_of(key_token + item * key_token_b + head * key_token_h, block, slot, key_slots, True)
    part = (item * heads + head) * parts + begin // share
    sum_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_v = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for number in range(cuts):
        at = (part + number) * key_slots
        sum_k += rows_at(part_k + at * WIDTH, held, WIDTH, 1, WIDTH, BLOCK_D, True)
        sum_v += rows_at(part_v + at * VALUE_WIDTH, held, VALUE_WIDTH, 1, VALUE_WIDTH, BLOCK_V, True)
    put_rows(grad_k + item * grad_k_b + head * grad_k_h, key, grad_k_n, grad_k_d, sum_k, WIDTH, BLOCK_D, True)
    put_rows(grad_v + item * grad_v_b + head * grad_v_h, key, grad_v_n, grad_v_d, sum_v, VALUE_WIDTH, BLOCK_V, True)


@triton.jit
def row_of(start, block, share):
    """Where a block's entries begin and end, and into how many pieces they are cut; int32."""
    begin = tl.load(start + block).to(tl.int32)
    end = tl.load(start + block + 1).to(tl.int32)
    return begin, end, tl.maximum((end - begin) // share, 1)


@triton.jit
def _weights(logits, total, peak, spot, BIASED: tl.constexpr, GAPS: tl.constexpr):
    """Weights of logits, keys by queries."""
    peaks, rest = denominators(total, peak, spot, GAPS)
    return weights_of(logits, settled(peaks)[None, :], settled(rest)[None, :], BIASED)


@triton.jit
def _pulled(weights, reached, average, rows, sum_k, PRECISION: tl.constexpr):
    """The gradient of keys, not yet scaled, with a tile of queries more; weights are keys by queries."""
    pull = weights * (reached - settled(average)[None, :])
    return tl.dot(pull.to(rows.dtype), rows, sum_k, input_precision=PRECISION)
