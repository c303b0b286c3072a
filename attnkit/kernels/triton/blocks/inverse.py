"""The inverse of an index of blocks: which blocks of queries see a block of keys, cut into pieces.

Made on the device of the index by PyTorch's operators, none of which waits for a result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Inverse(NamedTuple):
    """Who sees each block of keys, in tables (B or 1, heads or 1, ...) of int64.

    An entry is the number `row * topk + place` of a place in the index. The entries of key block c are
    `entry[start[c]:start[c + 1]]`, in order. They are cut into `max(count // share, 1)` pieces of about one size, whose
    numbers begin at `c + start[c] // share`; some numbers before a block's may be nobody's. Sums of the pieces of
    blocks with several stand from `start[c] // share` on. Neither need be counted, since `start[c] // share` grows by
    `count // share` or by one more.

    Attributes:
        entry: (..., R * topk) entries by the block of keys that they name; those of -1 stand first.
        start: (..., blocks + 1) where the entries of a block begin.
        piece_block: (..., pieces) block of keys to which the number of a piece belongs.
        share: entries that a piece has at least where a block has several; it has less than twice as many.
        pieces: numbers of pieces.
        parts: sums there are room for.
    """

    entry: Tensor
    start: Tensor
    piece_block: Tensor
    share: int
    pieces: int
    parts: int


def inverse_of(index: Tensor, blocks: int, least: int) -> Inverse:
    """The inverse of an index.

    A block of keys that many see is cut into pieces of at least twice the entries that blocks have on average, so that
    no piece takes more than four times as long as an average block, and all pieces of such blocks together are half as
    many as there are blocks.

    Args:
        index: int64 (B or 1, heads or 1, R, topk) blocks of keys, -1 for none.
        blocks: number of blocks of keys.
        least: entries that a piece has at least.
    """
    named, entry = index.flatten(2).sort(dim=-1, stable=True)
    lead, entries = named.shape[:2], named.shape[2]
    share = max(2 * -(-entries // blocks), least)
    pieces, parts = blocks + entries // share, entries // share
    numbers = torch.arange(max(blocks, pieces) + 1, device=index.device)
    start = torch.searchsorted(named, numbers[: blocks + 1].repeat(*lead, 1))
    # The first number of the next block: as many of them as are not above a piece's stand before its block.
    follows = start[..., 1:] // share + numbers[1 : blocks + 1]
    piece_block = torch.searchsorted(follows, numbers[:pieces].repeat(*lead, 1), right=True)
    return Inverse(entry, start, piece_block, share, pieces, parts)
