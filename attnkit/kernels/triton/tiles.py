"""Parts of the kernels of blocks: where a program stands, which tokens a tile holds, its rows, and its logits.

Tokens are int64 numbers over the whole row, -1 where a slot is empty, so that all that is made of them are addresses
of 64 bits. Every function here is inlined; arguments in capitals are constants of the compiled kernel.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))

# Arguments of kernels that change with the image and the batch and on which no load of several numbers at once depends.
# Triton would compile a kernel anew for each combination of those that are 1, divisible by 16, or neither.
COUNTS = (
    *("heads", "queries", "query_blocks", "key_blocks", "entries", "pieces", "parts", "share", "shares", "pairs"),
    *("table_b", "table_h", "index_b", "index_h", "key_mask_b", "key_mask_h", "query_slot_b", "query_slot_h"),
    *("grad_total_b", "grad_total_h", "bias_heads", "bias_blocks", "shared_heads", "shared_blocks", "shared"),
    "rows_of_bias",
)


@triton.jit
def placed(tiles, blocks, heads):
    """Tile, block, item and head of a program; the tiles of a block and the blocks of a head are neighbours, so that
    programs that run together read the same keys."""
    program = tl.program_id(0)
    rest = program // tiles
    pair = rest // blocks
    return program % tiles, (rest % blocks).to(tl.int64), (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)


@triton.jit
def tokens_of(table, block, slot, slots, GAPS: tl.constexpr):
    """Tokens in some slots of a block; -1 behind its last slot, where there are GAPS."""
    spots = table + block * slots + slot
    if GAPS:
        token = tl.load(spots, mask=slot < slots, other=-1)
    else:
        token = tl.load(spots)
    return token


@triton.jit
def rows_at(base, token, stride, step, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GAPS: tl.constexpr):
    """Rows of tokens, (tokens, BLOCK): zeros behind WIDTH and, where there are GAPS, for tokens below 0."""
    column = tl.arange(0, BLOCK)
    spots = base + token[:, None] * stride + column[None, :] * step
    if GAPS and WIDTH < BLOCK:
        rows = tl.load(spots, mask=(token >= 0)[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif GAPS:
        rows = tl.load(spots, mask=(token >= 0)[:, None], other=0.0)
    elif WIDTH < BLOCK:
        rows = tl.load(spots, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        rows = tl.load(spots)
    return rows


@triton.jit
def put_rows(base, token, stride, step, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GAPS: tl.constexpr):
    """Writes what `rows_at` reads, in the dtype of the memory."""
    column = tl.arange(0, BLOCK)
    spots = base + token[:, None] * stride + column[None, :] * step
    rows = rows.to(base.dtype.element_ty)
    if GAPS and WIDTH < BLOCK:
        tl.store(spots, rows, mask=(token >= 0)[:, None] & (column < WIDTH)[None, :])
    elif GAPS:
        tl.store(spots, rows, mask=(token >= 0)[:, None])
    elif WIDTH < BLOCK:
        tl.store(spots, rows, mask=(column < WIDTH)[None, :])
    else:
        tl.store(spots, rows)


@triton.jit
def numbers_at(base, token, stride, other, GAPS: tl.constexpr):
    """One float32 number per token; `other` for tokens below 0 where there are GAPS."""
    if GAPS:
        found = tl.load(base + token * stride, mask=token >= 0, other=other)
    else:
        found = tl.load(base + token * stride)
    return found.to(tl.float32)


@triton.jit
def listed_tokens(column, listed, block, index, key_token, key_mask, prefix, key_slots):
    """Tokens of the columns of a block's list of keys: the prefix, then the slots of each block of keys it sees.

    The columns are those of a bias. -1 where there is no key or the mask hides it.

    Args:
        column: int32 numbers of columns.
        listed: columns the list has.
        block: the block of queries, which is what it sees where there is no index.
        index: pointer to the block's row of the index, or None.
        key_token: pointer to the tokens of the keys' cut.
        key_mask: pointer to the bytes of the mask, or None.
    """
    inside = column - prefix
    place = inside // key_slots
    image = (inside >= 0) & (column < listed)
    if index is not None:
        found = tl.load(index + place, mask=image, other=-1)
    else:
        found = tl.where(image, block, -1)
    token = tl.load(key_token + found * key_slots + (inside - place * key_slots), mask=found >= 0, other=-1)
    token = tl.where((inside < 0) & (column < listed), column.to(tl.int64), token)
    if key_mask is not None:
        seen = tl.load(key_mask + token, mask=token >= 0, other=0)
        token = tl.where(seen != 0, token, -1)
    return token


@triton.jit
def bias_at(bias, row, column, query, key, GAPS: tl.constexpr):
    """A tile of the bias: at its rows and columns, 0 where there are GAPS and no query or no key.

    Args:
        bias: pointer to the part of an item, head and block.
        row: offsets of the rows.
        column: offsets of the columns.
        query: tokens of the rows.
        key: tokens of the columns.
    """
    spots = bias + row[:, None] + column[None, :]
    if GAPS:
        found = tl.load(spots, mask=(query >= 0)[:, None] & (key >= 0)[None, :], other=0.0)
    else:
        found = tl.load(spots)
    return found.to(tl.float32)


@triton.jit
def turned_bias_at(rows, column, query, key, GAPS: tl.constexpr):
    """A tile of the bias, keys by queries: as `bias_at`, but `rows` are pointers."""
    spots = rows[None, :] + column[:, None]
    if GAPS:
        found = tl.load(spots, mask=(key >= 0)[:, None] & (query >= 0)[None, :], other=0.0)
    else:
        found = tl.load(spots)
    return found.to(tl.float32)


@triton.jit
def denominators(total, peak, spot, GAPS: tl.constexpr):
    """Two numbers of each query by which `weights_of` turns logits into weights.

    The first is infinity where nothing is seen and, where there are GAPS, for spots below 0: the power of a logit less
    infinity is 0, and so are the weights.

    Args:
        total: pointer to the sums of powers, or None where there is no bias: then the logits are to base 2, and `peak`
            is the lse.
        peak: pointer to the largest logits, -infinity where nothing is seen.
    """
    found = numbers_at(peak, spot, 1, INFINITY, GAPS)
    found = tl.where(found == -INFINITY, INFINITY, found)
    if total is None:
        found = found * LOG2E
        rest = found
    else:
        rest = tl.log2(numbers_at(total, spot, 1, 1.0, GAPS))
    return found, rest


@triton.jit
def weights_of(logits, peak, rest, BIASED: tl.constexpr):
    """Weights of logits, with what `denominators` gives.

    Under a bias in two steps: it may be as large as -1e9 for a whole row, beside which the sum of powers has no digits
    and which to base 2 may not be finite.
    """
    if BIASED:
        weights = tl.exp2((logits - peak) * LOG2E - rest)
    else:
        weights = tl.exp2(logits - peak)
    return weights


@triton.jit
def average_reached(grads, means, peaks, grad_total, total, spot, stride, GAPS: tl.constexpr):
    """What is taken off everything that a query's gradient reaches: `grad_out . out`, less what arrives at the sum of
    powers, times that sum, which is 1 where `total` is None."""
    average = tl.sum(grads.to(tl.float32) * means.to(tl.float32), 1)
    if grad_total is not None:
        arrived = numbers_at(grad_total, spot, stride, 0.0, GAPS)
        if total is not None:
            arrived *= numbers_at(total, spot, 1, 0.0, GAPS)
        average -= tl.where(peaks == INFINITY, 0.0, arrived)
    return average


@triton.jit
def settled(numbers):
    """The same numbers, as something that the compiler does not make anew.

    What comes from few loads it would load again for every thread that holds a logit of the column, which takes more
    registers than the logits. It does not look behind a reduction, here one over a single number.
    """
    return tl.max(numbers[:, None], 1)


@triton.jit
def penalty(token):
    """What hides the columns of tokens below 0 when it is added to the logits."""
    return settled(tl.where(token >= 0, 0.0, -INFINITY))[None, :]
