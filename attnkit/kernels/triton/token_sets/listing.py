"""Listing: what writes the lists of a call's tiles, from shapes, strides and dtypes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from attnkit.kernels.ops.token_sets import SetTables
from attnkit.kernels.triton.launch import Launch, with_strides
from attnkit.kernels.triton.token_sets.unions import token_set_marks, token_set_unions

# Bytes of marks at one time, but for one item and head at least.
MARKS = 1 << 26
# Queries and slots that a program marks at once, and columns that one looks for in a tile at once.
MARKED, MET = (16, 64), 64
# Warps of a program that lists a tile, whose bytes its threads hold in registers.
LISTING = 4


@dataclass(frozen=True, eq=False)
class Cleared:
    """Memory that is set to 0 between launches."""

    memory: Tensor

    def run(self) -> None:
        """Sets it to 0 on the current stream."""
        self.memory.zero_()


@dataclass(frozen=True, eq=False)
class Ranked:
    """An order of the keys: those that many queries see come first, so that few tiles of keys are seen by nearly all
    queries, and the others by few.

    Attributes:
        order: int32 (items or 1, heads or 1, keys - first), written here.
        seers: bytes (sets, tiles, keys), how many queries of a tile see a key.
        first: keys before those that have a place in it.
    """

    order: Tensor
    seers: Tensor
    first: int

    def run(self) -> None:
        """Writes the order on the current stream."""
        seen_by = self.seers[..., self.first :].sum(1, dtype=torch.int32)
        self.order.copy_(seen_by.argsort(dim=-1, descending=True, stable=True).view_as(self.order))


Step: TypeAlias = "Launch | Cleared | Ranked"


class Lists(NamedTuple):
    """The lists of all tiles of one side, and where an item and head find theirs; see `unions`.

    Attributes:
        lists: int32 (sets, tiles, columns).
        words: int32 or int64 (sets, tiles, columns).
        counts: int32 (sets, tiles).
        order: int32 (items or 1, heads or 1, tokens), the order of the rows that do not stand apart, or None.
    """

    lists: Tensor
    words: Tensor
    counts: Tensor
    order: Tensor | None

    @property
    def tiles(self) -> int:
        return self.counts.shape[1]


class Listing:
    """The lists of one call: those of a set serve all items and heads that see the same keys in the same order.

    Args:
        tables: the operator's arguments beside q, k and v.
        queries: number of queries, Nq.
        keys: number of keys, Nk.
    """

    def __init__(self, tables: SetTables, queries: int, keys: int) -> None:
        self.tables, self.queries, self.keys = tables, queries, keys
        # Triton reads bytes.
        self.key_mask = None if tables.key_mask is None else tables.key_mask.contiguous().view(torch.uint8)
        # Kernels count along it in steps of one.
        self.order = tables.order
        if self.order is not None and self.order.stride(-1) != 1:
            self.order = self.order.contiguous()
        leads = [one.shape[:2] for one in (tables.table, tables.key_mask, tables.order) if one is not None]
        self.items, self.heads = torch.broadcast_shapes(*leads)
        self.sets = self.items * self.heads
        self._made = tables.table.new_empty

    def of_queries(self, rows: int, seers: Tensor | None = None) -> tuple[Lists, list[Step]]:
        """The lists of tiles of so many queries, and the steps that write them, and `seers` where it is given."""
        return self._lists(rows, self.order, seers, turned=False)

    def of_keys(self, rows: int, seers: Tensor) -> tuple[Lists, list[Step]]:
        """The lists of tiles of so many keys, see `Ranked`, and the steps that write them once `seers` is written."""
        first = self.tables.keys_all
        order = self._made(self.items, self.heads, self.keys - first, dtype=torch.int32)
        found, steps = self._lists(rows, order, None, turned=True)
        return found, [Ranked(order, seers, first), *steps]

    def seers(self, rows: int) -> Tensor:
        """Memory for how many of so many queries see a key: bytes (sets, tiles, keys)."""
        return self._made(self.sets, _tiles(self.queries, self.tables.queries_all, rows), self.keys, dtype=torch.uint8)

    def _lists(
        self, rows: int, order: Tensor | None, seers: Tensor | None, *, turned: bool
    ) -> tuple[Lists, list[Step]]:
        tables = self.tables
        tokens, columns, apart = self.queries, self.keys, tables.queries_all
        if turned:
            tokens, columns, apart = self.keys, self.queries, tables.keys_all
        tiles = _tiles(tokens, apart, rows)
        made = self._made
        found = Lists(
            made(self.sets, tiles, columns, dtype=torch.int32),
            made(self.sets, tiles, columns, dtype=torch.int64 if rows > 32 else torch.int32),
            made(self.sets, tiles, dtype=torch.int32),
            order,
        )
        common = {
            "lists": found.lists,
            "words": found.words,
            "counts": found.counts,
            "seers": seers,
            **with_strides("key_mask", self.key_mask, "bh"),
            **with_strides("order", order, "bh"),
            "set_heads": self.heads,
            "tiles": tiles,
            "queries": self.queries,
            "keys": self.keys,
            "queries_all": tables.queries_all,
            "keys_all": tables.keys_all,
        }
        constants = {"BLOCK_M": rows, "BLOCK_N": MET, "TURNED": turned}

        def union(first: int, sets: int, seen: dict[str, Any]) -> Launch:
            arguments = {**common, **seen, "first": first}
            return Launch(token_set_unions, (tiles * sets,), arguments, constants, LISTING, 1)

        if tables.table.dtype == torch.bool:
            seen = with_strides("seen", tables.table.view(torch.uint8), "bhnk")
            return found, [union(0, self.sets, {**seen, "seen_s": 0})]
        steps: list[Step] = []
        lines = self.queries - tables.queries_all
        together = max(min(MARKS // max(lines * self.keys, 1), self.sets), 1)
        marks = made(together, lines, self.keys, dtype=torch.uint8)
        seen = {"seen": marks, "seen_s": lines * self.keys, "seen_b": 0, "seen_h": 0, "seen_n": self.keys, "seen_k": 1}
        for first in range(0, self.sets, together):
            sets = min(together, self.sets - first)
            steps += [Cleared(marks), self._marks(marks, first, sets), union(first, sets, seen)]
        return found, steps

    def _marks(self, marks: Tensor, first: int, sets: int) -> Launch:
        _, lines, keys = marks.shape
        arguments = {
            "marks": marks,
            **with_strides("index", self.tables.table, "bhnk"),
            "first": first,
            "set_heads": self.heads,
            "rows": lines,
            "slots": self.tables.table.shape[3],
            "keys": keys,
        }
        grid = (-(-lines // MARKED[0]) * sets,)
        return Launch(token_set_marks, grid, arguments, {"BLOCK_M": MARKED[0], "BLOCK_N": MARKED[1]}, 4, 1)


def _tiles(tokens: int, apart: int, rows: int) -> int:
    return -(-apart // rows) + -(-(tokens - apart) // rows)
