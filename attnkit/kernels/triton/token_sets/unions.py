"""Lists of a tile: the keys that any of its queries sees, with one bit for each of them, made on the device.

Who sees whom comes as one byte a pair: a token mask itself, or marks that `token_set_marks` makes of lists of keys,
for a few items and heads at a time. `token_set_unions` reads the bytes of a tile once and writes the columns of those
that any row sees, in ascending order, each beside a word whose bit r says whether row r does. The same kernel, with
rows and columns turned, lists the queries that see a tile of keys. A list has room for all columns, so that nobody
waits to learn how long it is; no entry depends on the order in which programs run.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

# Arguments of kernels that change with the image and the batch and on which no load of several numbers at once depends.
COUNTS = (
    *("heads", "tiles", "queries", "keys", "queries_all", "keys_all", "rows", "slots", "first", "set_heads", "set_b"),
    *("set_h", "order_b", "order_h", "seen_s", "seen_b", "seen_h", "index_b", "index_h", "key_mask_b", "key_mask_h"),
    *("grad_total_b", "grad_total_h", "own_heads", "shared_items", "shared_heads"),
)


@triton.jit(do_not_specialize=COUNTS)
def token_set_marks(
    marks,
    index,
    index_b,
    index_h,
    index_n,
    index_k,
    first,
    set_heads,
    rows,
    slots,
    keys,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Writes a one for each key of some queries' lists; several programs and threads write the same number.

    Args:
        marks: bytes (sets, rows, keys), all 0 before.
        index: keys of each query, -1 for none.
        first: number of the first set, which is `item * set_heads + head`.
        rows: queries that have lists.
        slots: room of a list.
    """
    tiles = tl.cdiv(rows, BLOCK_M)
    tile, number = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    item, head = (first + number) // set_heads, (first + number) % set_heads
    row = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    index += item * index_b + head * index_h
    marks += number * rows * keys
    one = tl.full((BLOCK_M, BLOCK_N), 1, tl.uint8)
    for start in range(0, slots, BLOCK_N):
        slot = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (row < rows)[:, None] & (slot < slots)[None, :]
        key = tl.load(index + row[:, None] * index_n + slot[None, :] * index_k, mask=inside, other=-1)
        tl.store(marks + row[:, None] * keys + key, one, mask=(key >= 0) & (key < keys))


@triton.jit(do_not_specialize=COUNTS)
def token_set_unions(
    lists,
    words,
    counts,
    seers,
    seen,
    key_mask,
    order,
    seen_s,
    seen_b,
    seen_h,
    seen_n,
    seen_k,
    key_mask_b,
    key_mask_h,
    order_b,
    order_h,
    first,
    set_heads,
    tiles,
    queries,
    keys,
    queries_all,
    keys_all,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TURNED: tl.constexpr,
):
    """The list of a tile of BLOCK_M queries or, where TURNED, of keys.

    Args:
        lists: int32 (sets, tiles, columns), columns being keys or, where TURNED, queries.
        words: int32, or int64 for more than 32 rows, of the same shape.
        counts: int32 (sets, tiles), how long a list is.
        seers: bytes (sets, tiles, columns), how many rows see a column; or None.
        seen: bytes of the pairs, but for the first `queries_all` queries.
        key_mask: bytes of the keys, or None.
        order: int32, in which order rows come; see `row_tokens`.
        seen_s: stride of a set counted from the first; those of items and heads are 0 then, or else this one is.
        first: number of the first set, which is `item * set_heads + head`.
        queries_all: how many of the first queries see every key.
        keys_all: how many of the first keys every query sees.
    """
    tile, number = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    item, head = (first + number) // set_heads, (first + number) % set_heads
    seen += number * seen_s + item * seen_b + head * seen_h
    if key_mask is not None:
        key_mask += item * key_mask_b + head * key_mask_h
    columns = queries if TURNED else keys
    if order is not None:
        order += item * order_b + head * order_h
    own = row_tokens(order, tile, keys if TURNED else queries, keys_all if TURNED else queries_all, BLOCK_M)
    at = ((first + number) * tiles + tile) * columns
    bits = row_bits(BLOCK_M)
    count = tl.zeros((), tl.int32)
    for start in range(0, columns, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        query, key = own[:, None], column[None, :]
        if TURNED:
            query, key = column[None, :], own[:, None]
        inside = (own >= 0)[:, None] & (column < columns)[None, :]
        every = (query < queries_all) | (key < keys_all)
        spots = seen + (query - queries_all).to(tl.int64) * seen_n + key.to(tl.int64) * seen_k
        met = tl.load(spots, mask=inside & (query >= queries_all), other=0)
        met = inside & ((met != 0) | every)
        if key_mask is not None:
            shown = tl.load(key_mask + key, mask=(key >= 0) & (key < keys), other=0)
            met = met & (shown != 0)
        if seers is not None:
            number_of = tl.sum(tl.where(met, 1, 0), 0)
            tl.store(seers + at + column, number_of.to(tl.uint8), mask=column < columns)
        word = tl.sum(tl.where(met, bits[:, None], 0), 0)
        some = tl.where(word != 0, 1, 0)
        spot = at + count + tl.cumsum(some, 0) - some
        tl.store(lists + spot, column, mask=some != 0)
        tl.store(words + spot, word, mask=some != 0)
        count += tl.sum(some, 0)
    tl.store(counts + (first + number) * tiles + tile, count)


@triton.jit
def row_tokens(order, tile, tokens, apart, BLOCK: tl.constexpr):
    """The tokens of a tile's rows, -1 for none: the first `apart` tokens, whose lists hold everything, in tiles of
    their own, and the others, counted from there, in the order they are given, or one after another for None."""
    slot = tile * BLOCK + tl.arange(0, BLOCK)
    first = tl.cdiv(apart, BLOCK) * BLOCK
    token = tl.where(slot < first, slot, slot - first + apart)
    last = tl.where(slot < first, apart, tokens)
    token = tl.where(token < last, token, -1)
    if order is not None:
        token = tl.where(token < apart, token, apart + tl.load(order + token - apart, mask=token >= apart, other=0))
    return token


@triton.jit
def row_bits(BLOCK: tl.constexpr):
    """The bit of each row in a word: int32, or int64 for more than 32 rows."""
    row = tl.arange(0, BLOCK)
    if BLOCK > 32:
        bits = tl.full((BLOCK,), 1, tl.int64) << row.to(tl.int64)
    else:
        bits = tl.full((BLOCK,), 1, tl.int32) << row
    return bits


@triton.jit
def listed(lists, words, start, count, BLOCK: tl.constexpr):
    """Some columns of a tile's list, -1 behind its end, and their words, 0 there."""
    place = start + tl.arange(0, BLOCK)
    token = tl.load(lists + place, mask=place < count, other=-1).to(tl.int64)
    word = tl.load(words + place, mask=place < count, other=0)
    return token, word
