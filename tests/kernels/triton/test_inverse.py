"""The inverse of an index: who sees a block of keys, in pieces of bounded size."""

from __future__ import annotations

import pytest
import torch

from attnkit.kernels.triton.blocks.inverse import inverse_of


def pieces_of(inverse, table, blocks, topk):
    """The rows of the index in every piece, by block of keys, as a kernel walks them."""
    entry, start, owner = (one.flatten(0, 1)[table].tolist() for one in inverse[:3])
    found, used = {block: [] for block in range(blocks)}, []
    assert len(owner) == inverse.pieces
    for piece, block in enumerate(owner):
        if block == blocks:
            continue
        begin, end = start[block], start[block + 1]
        cuts, part = max((end - begin) // inverse.share, 1), begin // inverse.share
        size, number = -(-(end - begin) // cuts), piece - block - part
        if not 0 <= number < cuts:
            continue
        places = entry[begin + number * size : min(begin + (number + 1) * size, end)]
        assert len(places) < 2 * inverse.share
        found[block] += [divmod(place, topk) for place in places]
        if cuts > 1:
            used.append(part + number)
    # No part twice, and none without room.
    assert sorted({*used}) == used and all(one < inverse.parts for one in used)
    return found


@pytest.mark.parametrize("lead", [(1, 1), (2, 3), (2, 1)])
@pytest.mark.parametrize(
    ("rows", "blocks", "topk", "least"), [(9, 9, 2, 1), (16, 4, 4, 3), (5, 20, 3, 1), (7, 3, 1, 4)]
)
def test_every_entry_stands_in_one_piece(lead, rows, blocks, topk, least):
    generator = torch.Generator().manual_seed(rows)
    # Few of the blocks are popular, some seen by nobody.
    index = (torch.rand(*lead, rows, topk, generator=generator) ** 3 * (blocks + 1)).long() - 1
    inverse = inverse_of(index, blocks, least)
    assert inverse.share >= least
    for table, own in enumerate(index.flatten(0, 1)):
        found = pieces_of(inverse, table, blocks, topk)
        for block in range(blocks):
            assert found[block] == [tuple(place) for place in (own == block).nonzero().tolist()]


def test_a_block_that_all_see_is_cut():
    inverse = inverse_of(torch.zeros(1, 1, 64, 4, dtype=torch.int64), 64, 1)
    assert inverse.share == 8
    # One of each: a block of one piece, and what that block has more.
    assert (inverse.piece_block == 0).sum() == 1 + 32
    assert inverse.parts == 32


def test_an_index_without_entries():
    for index in (torch.full((1, 1, 4, 2), -1), torch.empty(1, 1, 4, 0, dtype=torch.int64)):
        inverse = inverse_of(index, 4, 1)
        assert pieces_of(inverse, 0, 4, 2) == {block: [] for block in range(4)}
