"""The forward kernel of token sets: a tile of queries over the list of keys that any of them sees.

Keys and values are fetched once for the tile, by the list; a bit of each key's word says which of the queries sees it.
Logits are to base 2, but to base e where there is a bias, whose largest finite numbers must stay finite.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attnkit.kernels.triton.tiles import INFINITY, LN2, LOG2E, placed, put_rows, rows_at
from attnkit.kernels.triton.token_sets.unions import COUNTS, listed, row_bits, row_tokens


@triton.jit(do_not_specialize=COUNTS)
def token_sets_forward(
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
    """Output, sum of powers and largest logit of a tile of BLOCK_M queries.

    Args:
        total: float32 (B, heads, queries), written here; 1 without a bias.
        peak: the same, -infinity where nothing is seen; the lse without a bias.
        lists: keys of the tiles, with their `words` and `counts`; see `attnkit.kernels.triton.token_sets.unions`.
        order: the order of the queries outside the first `queries_all`, or None; see `row_tokens` there.
        scale: factor of the logits.
        set_b: the lists of an item and head are those of the set `item * set_b + head * set_h`.
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
    k += item * k_b + head * k_h
    v += item * v_b + head * v_h
    if bias is not None:
        bias += item * bias_b + head * bias_h
    high = tl.full((BLOCK_M,), -INFINITY, tl.float32)
    powers = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, count, BLOCK_N):
        key, word = listed(lists, words, start, count, BLOCK_N)
        near = rows_at(k, key, k_n, k_d, WIDTH, BLOCK_D, True)
        products = tl.dot(rows, tl.trans(near), input_precision=PRECISION)
        seen = (word[None, :] & bits[:, None]) != 0
        logits = logits_of(products, bias, query[:, None], key[None, :], bias_n, bias_k, seen, scale)
        values = rows_at(v, key, v_n, v_d, VALUE_WIDTH, BLOCK_V, True)
        weights, kept, high, powers = step(logits, high, powers, bias is not None)
        mean = tl.dot(weights.to(values.dtype), values, mean * kept[:, None], input_precision=PRECISION)
    safe = tl.where(powers == 0.0, 1.0, powers)
    put_rows(out + item * out_b + head * out_h, query, out_n, out_d, mean / safe[:, None], VALUE_WIDTH, BLOCK_V, True)
    if bias is None:
        high = (high + tl.log2(safe)) * LN2
        safe = tl.full((BLOCK_M,), 1.0, tl.float32)
    high = tl.where(powers == 0.0, -INFINITY, high)
    spot = (item * heads + head) * queries + query
    tl.store(total + spot, safe, mask=query >= 0)
    tl.store(peak + spot, high, mask=query >= 0)


@triton.jit
def tile_of(lists, words, counts, order, number, tile, tiles, tokens, columns, apart, BLOCK: tl.constexpr):
    """The tokens of a tile's rows, and how long its list is and where it stands; of set `number`."""
    own = row_tokens(order, tile, tokens, apart, BLOCK).to(tl.int64)
    at = number * tiles + tile
    return own, tl.load(counts + at), lists + at * columns, words + at * columns


@triton.jit
def logits_of(products, bias, query, key, bias_n, bias_k, seen, scale):
    """Logits from products of queries and keys, to base 2 without a bias and to base e with one; -inf where not seen.

    Args:
        products: a tile, either way round.
        bias: pointer to the part of an item and head, or None.
        query: tokens of the queries along their dimension, -1 for none.
        key: those of the keys along theirs.
        seen: bools of the tile.
    """
    if bias is not None:
        added = tl.load(bias + query * bias_n + key * bias_k, mask=seen, other=0.0)
        logits = products * scale + added.to(tl.float32)
    else:
        logits = products * (scale * LOG2E)
    return tl.where(seen, logits, -INFINITY)


@triton.jit
def step(logits, peak, total, NATURAL: tl.constexpr):
    """A step of online softmax: weights of a tile, the share that earlier sums keep, largest logits and totals.

    Args:
        NATURAL: whether logits are to base e; else to base 2.
    """
    higher = tl.maximum(peak, tl.max(logits, 1))
    shift = tl.where(higher == -INFINITY, 0.0, higher)
    weights, kept = logits - shift[:, None], peak - shift
    if NATURAL:
        weights *= LOG2E
        kept *= LOG2E
    weights, kept = tl.exp2(weights), tl.exp2(kept)
    return weights, kept, higher, total * kept + tl.sum(weights, 1)
