"""Products over channels: of rows that a program holds, or a few channels at a time.

Tensor cores take their operands from shared memory. Exact products of float32 are made without them, by threads that
hold whole rows of both operands: 512 numbers of a thread where rows are 256 wide, and 255 registers is all there is.
There the rows are read again, DEPTH channels at a time, which caches hold.
"""

# Kernels hand over Python's numbers as constants, and have branches that are settled when they are compiled.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def over_channels(
    left,
    right,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    LEFT_GAPS: tl.constexpr,
    RIGHT_GAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of the rows of two tiles, float32 (rows of `left`, rows of `right`).

    Args:
        left: the rows, and where they stand: a pointer, tokens, stride and step, as `rows_at` takes them.
        right: the same of the other tile.
        WIDTH: channels.
        DEPTH: how many of them are read and multiplied at a time; None: all, in the rows that are given.
        LEFT_GAPS: whether tokens of `left` may be below 0.
        RIGHT_GAPS: whether tokens of `right` may be.
    """
    rows, base, token, stride, step = left
    others, other_base, other_token, other_stride, other_step = right
    if DEPTH is None:
        found = tl.dot(rows, tl.trans(others), input_precision=PRECISION)
    else:
        found = tl.zeros((token.shape[0], other_token.shape[0]), tl.float32)
        # Not unrolled: the channels of rows that stay the same from tile to tile would be held after all.
        for first in range(0, WIDTH, DEPTH):
            some = _channels_at(base, token, stride, step, first, WIDTH, DEPTH, LEFT_GAPS)
            theirs = _channels_at(other_base, other_token, other_stride, other_step, first, WIDTH, DEPTH, RIGHT_GAPS)
            found = tl.dot(some, tl.trans(theirs), found, input_precision=PRECISION)
    return found


@triton.jit
def _channels_at(base, token, stride, step, first, WIDTH: tl.constexpr, DEPTH: tl.constexpr, GAPS: tl.constexpr):
    """DEPTH channels of what `rows_at` reads, from `first` on."""
    column = first + tl.arange(0, DEPTH)
    spots = base + token[:, None] * stride + column[None, :] * step
    if GAPS and WIDTH % DEPTH:
        rows = tl.load(spots, mask=(token >= 0)[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif GAPS:
        rows = tl.load(spots, mask=(token >= 0)[:, None], other=0.0)
    elif WIDTH % DEPTH:
        rows = tl.load(spots, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        rows = tl.load(spots)
    return rows
