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
    `entry[start[c]:start[c + 1]]`, in order. They are cut into `max(count // share, 1)` pieces of about one size.

    Attributes:
        entry: (..., R * topk) entries by the block of keys that they name; those of -1 stand first.
        start: (..., blocks + 1) where the entries of a block begin.
        piece_block: (..., pieces) block of keys to which a piece belongs; `blocks` behind the last piece.
        first_piece: (..., blocks) number of the first piece of a block.
        first_part: (..., blocks) the same, counting the pieces of blocks that have several only.
        share: entries that a piece has at least where a block has several; it has less than twice as many.
        pieces: pieces there are room for.
        parts: pieces of blocks with several there are room for.
    """

    entry: Tensor
    start: Tensor
    piece_block: Tensor
    first_piece: Tensor
    first_part: Tensor
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
    start = torch.searchsorted(named, _numbers(lead, blocks + 1, index))
    cuts = start.diff(dim=-1).div(share, rounding_mode="floor").clamp(min=1)
    end = cuts.cumsum(-1)
    piece_block = torch.searchsorted(end, _numbers(lead, pieces, index), right=True)
    several = cuts.where(cuts > 1, 0)
    return Inverse(entry, start, piece_block, end - cuts, several.cumsum(-1) - several, share, pieces, parts)


def _numbers(lead: torch.Size, count: int, like: Tensor) -> Tensor:
    """The numbers 0..count-1 for each table."""
    return torch.arange(count, device=like.device).repeat(*lead, 1)
