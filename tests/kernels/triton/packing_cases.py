"""Calls over small regions that share tiles, by the interpreter and on a GPU; judged as those of blocks are."""

from __future__ import annotations

from dataclasses import replace

import torch

from attnkit import Grid
from attnkit.layouts import Blocks
from tests.kernels.triton.block_cases import HEADS, ITEMS, UNEVEN, Case, masked, other_keys, permuted, regions, routes


def unseeing() -> Blocks:
    """Regions of 4 tokens that see nothing, and some whose first entries are -1."""
    index = routes(16, 1, 1, keep=6)
    index[..., 3, :], index[..., 5, :4] = -1, -1
    return Blocks.from_regions(Grid(8, 8), 4, index)


def turned_slots() -> Blocks:
    """Windows of permuted rows with an empty slot, in each item and head, whose slots lie head by head."""
    order = permuted(39, 5, 1, ITEMS, HEADS).order
    turned = replace(order, slot=order.slot.mT.contiguous().mT)
    return Blocks(turned, routes(8, ITEMS, HEADS, keep=5), prefix=1)


def permuted_routes() -> Blocks:
    """Routes between windows of a permuted row, of each item and head."""
    order = permuted(40, 5, 1, ITEMS, HEADS).order
    return Blocks(order, routes(8, ITEMS, HEADS, keep=4), prefix=1)


CASES: dict[str, Case] = {
    "regions of 4": Case(lambda: regions(Grid(8, 12), (4, 6), 1, 1, keep=8)),
    "regions of 4, a table per item": Case(lambda: regions(Grid(8, 8), 4, ITEMS, 1, keep=4), options={"scale": -0.4}),
    "regions of 9, a prefix": Case(lambda: regions(Grid(6, 9, prefix=2), (2, 3), ITEMS, 1, keep=4), (16, 32)),
    "regions of 9, a table per head": Case(lambda: regions(Grid(9, 9), 3, 1, HEADS, keep=6), (24, 40)),
    "regions of one token": Case(lambda: regions(Grid(4, 5), (4, 5), 1, 1, keep=3), (3, 1)),
    "regions that do not divide": Case(lambda: regions(UNEVEN, (4, 3), 1, 1, keep=6)),
    "regions that see nothing": Case(unseeing),
    "a table per item and head, a prefix, keys hidden per item": Case(
        lambda: masked(regions(Grid(6, 8, prefix=1), (3, 4), ITEMS, HEADS, keep=5), ITEMS, 1)
    ),
    "keys hidden per item and head": Case(lambda: masked(regions(Grid(4, 8), (2, 4), 1, 1, keep=4), ITEMS, HEADS)),
    "keys cut otherwise": Case(other_keys),
    "windows of a permuted row": Case(permuted_routes),
    "slots that are turned": Case(turned_slots),
    "float16": Case(lambda: regions(Grid(8, 8), 4, 1, HEADS, keep=5), options={"dtype": torch.float16}),
    "bfloat16, a prefix": Case(
        lambda: regions(Grid(8, 8, prefix=1), 4, ITEMS, 1, keep=5), options={"dtype": torch.bfloat16}
    ),
    "tiles of the table": Case(lambda: regions(Grid(8, 10), (4, 5), 1, 1, keep=7), (32, 32), {"heads": 1}, tiles=True),
    "bfloat16, tiles of the table": Case(
        lambda: regions(Grid(8, 10), (4, 5), 1, 1, keep=7), (32, 32), {"heads": 1, "dtype": torch.bfloat16}, tiles=True
    ),
}
