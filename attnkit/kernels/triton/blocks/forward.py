"""The forward kernel of blocks: a tile of a block's queries over all keys that it sees, by online softmax.

Keys and values are read where they stand, a tile at a time, through the tables of the cut; nothing is copied beside
each other. Where a tile of keys falls into one block without gaps (DIRECT), it is read without masks; otherwise the
keys that a block of queries sees are one list, cut into tiles across the borders of blocks, so that small blocks share
a tile. Logits are to base 2, except under a bias, which may be large.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.tiles import (
    COUNTS,
    INFINITY,
    LN2,
    LOG2E,
    bias_at,
    listed_tokens,
    penalty,
    placed,
    put_rows,
    rows_at,
    tokens_of,
)


@triton.jit(do_not_specialize=COUNTS)
def blocks_forward(
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
    GAPS: tl.constexpr,
    DIRECT: tl.constexpr,
    PREFIX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output, sum of powers and largest logit of a tile of BLOCK_M queries.

    Args:
        total: float32 (B, heads, queries), written here; 1 without a bias.
        peak: the same, -infinity where nothing is seen; the lse without a bias.
        scale: factor of the logits.
        queries: queries outside the prefix, which `out`, `total` and `peak` begin with.
        topk: blocks of keys a block of queries sees, entries of -1 among them; 1 without an index.
        GAPS: whether a tile of queries may have empty slots.
        DIRECT: whether every tile of BLOCK_N keys falls into one block, without empty slots or a mask.
        PREFIX: whether there is a prefix.
    """
    tile, block, item, head = placed(tl.cdiv(query_slots, BLOCK_M), query_blocks, heads)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = tokens_of(query_token + item * query_token_b + head * query_token_h, block, row, query_slots, GAPS)
    rows = rows_at(q + item * q_b + head * q_h, query, q_n, q_d, WIDTH, BLOCK_D, GAPS)
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
    high = tl.full((BLOCK_M,), -INFINITY, tl.float32)
    powers = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
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
            logits = tl.dot(rows, tl.trans(near), input_precision=PRECISION) * unit
            if bias is not None:
                logits += bias_at(bias, row * bias_t, column * bias_c, query, key, True)
            logits += penalty(key)
            values = rows_at(v, key, v_n, v_d, VALUE_WIDTH, BLOCK_V, True)
            high, powers, mean = _met(logits, values, high, powers, mean, 0.0, BIASED, PRECISION)
        highest = tl.max(met, 0)
    if DIRECT:
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
            near = rows_at(k, key, k_n, k_d, WIDTH, BLOCK_D, index is not None)
            logits = tl.dot(rows, tl.trans(near), input_precision=PRECISION) * unit
            if bias is not None:
                SOME_GAPS: tl.constexpr = GAPS or index is not None
                logits += bias_at(bias, row * bias_t, (prefix + column) * bias_c, query, key, SOME_GAPS)
            values = rows_at(v, key, v_n, v_d, VALUE_WIDTH, BLOCK_V, index is not None)
            high, powers, mean = _met(logits, values, high, powers, mean, unseen, BIASED, PRECISION)
    if index is not None or not DIRECT:
        # Queries that see nothing may be NaN.
        powers = tl.where(highest >= 0, powers, 0.0)
        mean = tl.where(highest >= 0, mean, 0.0)
    safe = tl.where(powers == 0.0, 1.0, powers)
    spot = query - prefix
    out += item * out_b + head * out_h
    put_rows(out, spot, out_n, out_d, mean / safe[:, None], VALUE_WIDTH, BLOCK_V, GAPS)
    if not BIASED:
        high = (high + tl.log2(safe)) * LN2
        safe = tl.full((BLOCK_M,), 1.0, tl.float32)
    high = tl.where(powers == 0.0, -INFINITY, high)
    first = (item * heads + head) * queries
    if GAPS:
        tl.store(total + first + spot, safe, mask=spot >= 0)
        tl.store(peak + first + spot, high, mask=spot >= 0)
    else:
        tl.store(total + first + spot, safe)
        tl.store(peak + first + spot, high)


@triton.jit
def _met(logits, values, peak, total, mean, unseen, BIASED: tl.constexpr, PRECISION: tl.constexpr):
    """A step of online softmax: the largest logit, sum of powers and sum of values of each row, with a tile more.

    Args:
        unseen: 0, or infinity where the tile's logits, finite ones, do not count.
    """
    higher = tl.maximum(peak, tl.max(logits, 1) - unseen)
    shift = tl.where(higher == -INFINITY, 0.0, higher)
    if BIASED:
        weights = tl.exp(logits - (shift + unseen)[:, None])
        kept = tl.exp(peak - shift)
    else:
        weights = tl.exp2(logits - (shift + unseen)[:, None])
        kept = tl.exp2(peak - shift)
    total = total * kept + tl.sum(weights, 1)
    mean = tl.dot(weights.to(values.dtype), values, mean * kept[:, None], input_precision=PRECISION)
    return higher, total, mean
