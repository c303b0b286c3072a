"""Blocks, put in order: rows of some (item, head) pairs with the tokens of a block beside each other, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnkit.kernels.chunked.sizes import cut, fitting
from attnkit.kernels.ops.blocks import BlockTables, wide


class Near(NamedTuple):
    """What the blocks first..last-1 of a slab see: keys and values (blocks, keys, width), what is added to the logits
    (blocks, T or 1, keys) or None, and where in it nothing is seen (blocks, T or 1)."""

    k: Tensor
    v: Tensor
    mask: Tensor | None
    empty: Tensor | None


class Slabs:
    """The rows of a few pairs (item, head) at a time, in the order of their blocks, in buffers that are used again.

    A pair is a number, item * heads + head. What tables say is empty or masked is zero here, whatever stands there, so
    that NaN where nobody looks stays where it is.

    Args:
        q: queries (B, heads, N, D); only shape and dtype are looked at.
        v: values (B, heads, N, Dv); only shape and dtype are looked at.
        tables: the call's tables.
        written: whether logits are written out, so that fewer blocks are worked on at a time.
    """

    def __init__(self, q: Tensor, v: Tensor, tables: BlockTables, written: bool) -> None:
        self.tables, self.heads, self.dtype = tables, q.shape[1], wide(q.dtype)
        self.like = q.new_empty(0, dtype=self.dtype)
        pairs = q.shape[0] * self.heads
        # PyTorch's fused attention knows one width.
        self.width = max(q.shape[3], v.shape[3])
        self.query_blocks, self.query_slots = tables.query_token.shape[2:]
        self.key_blocks, self.key_slots = tables.key_token.shape[2:]
        self._read_tables()
        bytes_each = self.like.element_size()
        rows = max(self.query_blocks * self.query_slots, self.key_blocks * self.key_slots)
        self.count = max(1, min(pairs, fitting(rows * self.width * bytes_each)))
        self.slabs = [(start, min(start + self.count, pairs)) for start in range(0, pairs, self.count)]
        near = tables.prefix + self.key_slots * (1 if self.ids is None else self.ids.shape[3])
        self.near_bytes = near * bytes_each * (self.query_slots if written else 2 * self.width)
        # One block more than there are: what -1 fetches.
        self.spare = self.count * self.key_blocks
        self._fetched: dict[str, Tensor] = {}
        self._moved: dict[tuple[int, torch.dtype], Tensor] = {}
        self._hole_numbers: dict[tuple[bool, int, int], Tensor] = {}

    def queries(self) -> Tensor:
        """A slab of zeros (pairs * blocks, T, width) for what queries have."""
        return self.like.new_zeros(self.count * self.query_blocks, self.query_slots, self.width)

    def keys(self) -> Tensor:
        """A slab of zeros (pairs * blocks + 1, T, width) for what keys have."""
        return self.like.new_zeros(self.spare + 1, self.key_slots, self.width)

    def first_keys(self) -> Tensor:
        """A slab of zeros (pairs, prefix, width) for what prefix keys have."""
        return self.like.new_zeros(self.count, self.tables.prefix, self.width)

    def start(self, first: int, last: int) -> None:
        """Says that what follows is about the pairs first..last-1."""
        self.pairs = [divmod(pair, self.heads) for pair in range(first, last)]
        self.blocks = len(self.pairs) * self.query_blocks
        self.owner = torch.arange(len(self.pairs)).repeat_interleave(self.query_blocks)
        tables = self.tables
        if self.ids is not None:
            ids = torch.stack([self._of(self.ids, pair) for pair in self.pairs])
            steps = torch.arange(len(self.pairs)).view(-1, 1, 1) * self.key_blocks
            self.spots = torch.where(ids < 0, self.spare, ids + steps).flatten(0, 1)
        if self.masked:
            unseen = torch.ones(self.spare + 1, self.key_slots, dtype=torch.bool)
            for at, pair in enumerate(self.pairs):
                part = unseen[at * self.key_blocks : (at + 1) * self.key_blocks].view(-1)
                part.fill_(False) if self.key_hidden is None else part.copy_(self._of(self.key_hidden, pair))
            self.unseen = unseen
        if tables.bias is not None:
            steps = [size > 1 for size in tables.bias.shape[:3]]
            _, heads, blocks = tables.bias.shape[:3]
            bases = torch.tensor([(item * heads * steps[0] + head * steps[1]) * blocks for item, head in self.pairs])
            self.biases = (bases.view(-1, 1) + torch.arange(self.query_blocks) * steps[2]).flatten()

    def chunks(self) -> list[tuple[int, int]]:
        """First and last + 1 of the blocks that are worked on together."""
        return cut(self.blocks, self.near_bytes)

    def put_queries(self, rows: Tensor, slab: Tensor) -> Tensor:
        """Rows (B, heads, N, D) without prefix tokens into a slab of queries; the part in use, (blocks, T, width)."""
        return self._put(rows, slab, self.query_blocks, self.query_spot, self.query_hidden)

    def put_keys(self, rows: Tensor, slab: Tensor, first: Tensor) -> None:
        """Rows (B, heads, N, D) into a slab of keys, and those of the prefix into one of its own."""
        self._put(rows, slab, self.key_blocks, self.key_spot, self.key_hidden)
        for at, (item, head) in enumerate(self.pairs if self.tables.prefix else ()):
            first[at, :, : rows.shape[3]] = rows[item, head, : self.tables.prefix]
            if self.tables.key_mask is not None:
                seen = self._of(self.tables.key_mask, (item, head))[: self.tables.prefix]
                first[at].masked_fill_(~seen[:, None], 0.0)

    def put_numbers(self, numbers: Tensor, hidden: float) -> Tensor:
        """One number per query (B, heads, N) as (blocks, T), with `hidden` where a slot is empty."""
        slab = self.like.new_empty(len(self.pairs), self.query_blocks * self.query_slots)
        for at, pair in enumerate(self.pairs):
            slab[at] = numbers[pair].index_select(0, self._of(self.query_spot, pair))
            if self.query_hidden is not None:
                slab[at].masked_fill_(self._of(self.query_hidden, pair), hidden)
        return slab.view(self.blocks, self.query_slots)

    def put_products(self, first: Tensor, second: Tensor) -> Tensor:
        """The products of rows of two (B, heads, N, D), one number per query, as (blocks, T); zero at empty slots."""
        slab = self.like.new_empty(len(self.pairs), self.query_blocks * self.query_slots)
        for at, pair in enumerate(self.pairs):
            numbers = (first[pair].to(self.dtype) * second[pair].to(self.dtype)).sum(-1)
            torch.index_select(numbers, 0, self._of(self.query_spot, pair), out=slab[at])
            if self.query_hidden is not None:
                slab[at].masked_fill_(self._of(self.query_hidden, pair), 0.0)
        return slab.view(self.blocks, self.query_slots)

    def take_queries(self, slab: Tensor, rows: Tensor) -> None:
        """What queries have, back from a slab into rows (B, heads, N, D) without prefix tokens."""
        self._take(slab, rows, self.query_blocks, self.tables.query_slot)

    def take_keys(self, slab: Tensor, first: Tensor, rows: Tensor) -> None:
        """What keys have, back from the slabs into rows (B, heads, N, D)."""
        self._take(slab, rows[:, :, self.tables.prefix :], self.key_blocks, self.tables.key_slot)
        for at, pair in enumerate(self.pairs if self.tables.prefix else ()):
            rows[pair][: self.tables.prefix] = first[at, :, : rows.shape[3]]

    def take_numbers(self, slab: Tensor, numbers: Tensor) -> None:
        """One number per query, back from (blocks, T) into (B, heads, N)."""
        flat = slab.view(len(self.pairs), -1)
        for at, pair in enumerate(self.pairs):
            torch.index_select(flat[at], 0, self._of(self.tables.query_slot, pair), out=numbers[pair])

    def near(self, k: Tensor, v: Tensor, first_k: Tensor, first_v: Tensor, first: int, last: int) -> Near:
        """What the blocks first..last-1 see, from the slabs of keys and values and their prefixes."""
        near_k, near_v = (
            self._fetch(name, slab, before, first, last)
            for name, slab, before in (("k", k, first_k), ("v", v, first_v))
        )
        tables, unseen, mask = self.tables, None, None
        if self.masked:
            unseen = self.unseen.index_select(0, self._spots(first, last)).view(last - first, -1)
            if tables.prefix:
                unseen = torch.cat([self._unseen_prefix(first, last), unseen], dim=1)
            # Mostly only a map's last block has empty slots; without a mask fused attention is faster.
            if not bool(unseen.any()):
                unseen = None
        if tables.bias is not None:
            bias = tables.bias.reshape(-1, *tables.bias.shape[3:])
            mask = bias.index_select(0, self.biases[first:last]).to(self.dtype)
            if unseen is not None:
                mask = mask.masked_fill_(unseen[:, None], -torch.inf)
            if self.query_hidden is not None:
                hidden = torch.stack([self._of(self.query_hidden, pair) for pair in self.pairs])
                mask = mask.masked_fill_(hidden.view(self.blocks, -1, 1)[first:last], 0.0)
        elif unseen is not None:
            mask = self.like.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)[:, None]
        return Near(near_k, near_v, mask, None if mask is None else mask.amax(-1) == -torch.inf)

    def clear_keys(self, slab: Tensor, before: Tensor) -> None:
        """Zeros in the slabs that `add_keys` adds to."""
        before.zero_()
        if self.ids is not None:
            slab.zero_()

    def add_keys(self, grad: Tensor, slab: Tensor, before: Tensor, first: int, last: int) -> None:
        """Adds what the keys of the blocks first..last-1 get, (blocks, keys, width), where those keys stand."""
        prefix = self.tables.prefix
        if prefix:
            before.index_add_(0, self.owner[first:last], grad[:, :prefix])
            grad = grad[:, prefix:]
        if self.ids is None:
            slab[first:last] = grad
        else:
            shares = grad.reshape(-1, self.key_slots * self.width)
            slab.view(-1, shares.shape[1]).index_add_(0, self.spots[first:last].flatten(), shares)

    def _read_tables(self) -> None:
        tables = self.tables
        no_query, no_key = (
            token < 0 if padded else None
            for token, padded in zip((tables.query_token, tables.key_token), tables.padded, strict=True)
        )
        self.query_spot, self.key_spot = tables.query_token.flatten(2), tables.key_token.flatten(2)
        if no_query is not None or tables.prefix:
            self.query_spot = (self.query_spot - tables.prefix).clamp(min=0)
        if no_key is not None:
            self.key_spot = self.key_spot.clamp(min=0)
        self.query_hidden = None if no_query is None else no_query.flatten(2)
        # A block without queries fetches nothing: what only it would see may hold NaN.
        idle = None if no_query is None else no_query.all(-1)
        self.ids = tables.routes
        if idle is not None and self.ids is not None:
            self.ids = torch.where(idle[..., None], -1, self.ids)
        elif idle is not None:
            no_key = idle[..., None] if no_key is None else no_key | idle[..., None]
            no_key = no_key.expand(*no_key.shape[:3], self.key_slots)
        hidden = None if no_key is None else no_key.flatten(2)
        if tables.key_mask is not None:
            shape = torch.broadcast_shapes(tables.key_mask.shape[:2], self.key_spot.shape[:2])
            mask, spot = (one.expand(*shape, -1) for one in (tables.key_mask, self.key_spot))
            unseen = ~mask.gather(2, spot)
            hidden = unseen if hidden is None else hidden | unseen
        self.key_hidden = hidden
        self.masked = hidden is not None or (self.ids is not None and bool((self.ids < 0).any()))

    def _of(self, table: Tensor, pair: tuple[int, int]) -> Tensor:
        """A table's part for a pair."""
        item, head = pair
        return table[item if table.shape[0] > 1 else 0, head if table.shape[1] > 1 else 0]

    def _put(self, rows: Tensor, slab: Tensor, blocks: int, spots: Tensor, hidden: Tensor | None) -> Tensor:
        used = slab[: len(self.pairs) * blocks]
        targets = used.view(len(self.pairs), -1, self.width)
        width = rows.shape[3]
        for target, pair in zip(targets, self.pairs, strict=True):
            spot = self._of(spots, pair)
            if rows.dtype == self.dtype and width == self.width:
                torch.index_select(rows[pair], 0, spot, out=target)
            else:
                target[:, :width] = torch.index_select(
                    rows[pair], 0, spot, out=self._between(len(spot), width, rows.dtype)
                )
            if hidden is not None:
                target.index_fill_(0, self._holes(hidden, pair), 0.0)
        return used

    def _take(self, slab: Tensor, rows: Tensor, blocks: int, slots: Tensor) -> None:
        sources = slab[: len(self.pairs) * blocks].view(len(self.pairs), -1, self.width)
        width = rows.shape[3]
        for source, pair in zip(sources, self.pairs, strict=True):
            slot = self._of(slots, pair)
            if rows.dtype == self.dtype:
                torch.index_select(source[:, :width], 0, slot, out=rows[pair])
            else:
                between = self._between(len(slot), width, self.dtype)
                rows[pair] = torch.index_select(source[:, :width], 0, slot, out=between)

    def _holes(self, hidden: Tensor, pair: tuple[int, int]) -> Tensor:
        """Numbers of a pair's hidden slots: mostly few, so that all of a slab need not be written once more."""
        key = (hidden is self.key_hidden, pair[0] * (hidden.shape[0] > 1), pair[1] * (hidden.shape[1] > 1))
        if key not in self._hole_numbers:
            self._hole_numbers[key] = self._of(hidden, pair).nonzero().flatten()
        return self._hole_numbers[key]

    def _between(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """A buffer for rows on their way from one dtype or width to another."""
        return _buffer(self._moved, (width, dtype), rows, width, self.like.new_empty(0, dtype=dtype))

    def _spots(self, first: int, last: int) -> Tensor:
        """Which blocks of a slab of keys the blocks first..last-1 see, flat."""
        return torch.arange(first, last) if self.ids is None else self.spots[first:last].flatten()

    def _fetch(self, name: str, slab: Tensor, before: Tensor, first: int, last: int) -> Tensor:
        if self.ids is None:
            near = slab[first:last]
        else:
            spots = self._spots(first, last)
            rows = slab.view(len(slab), -1)
            near = torch.index_select(rows, 0, spots, out=_buffer(self._fetched, name, len(spots), rows.shape[1], rows))
            near = near.view(last - first, -1, self.width)
        if self.tables.prefix:
            near = torch.cat([before.index_select(0, self.owner[first:last]), near], dim=1)
        return near

    def _unseen_prefix(self, first: int, last: int) -> Tensor:
        prefix, mask = self.tables.prefix, self.tables.key_mask
        if mask is None:
            return torch.zeros(last - first, prefix, dtype=torch.bool)
        rows = torch.stack([~self._of(mask, pair)[:prefix] for pair in self.pairs])
        return rows.index_select(0, self.owner[first:last])


def _buffer(kept: dict, key: object, rows: int, width: int, like: Tensor) -> Tensor:
    """The first rows of a buffer that is made once and grows where it must."""
    if key not in kept or len(kept[key]) < rows:
        kept[key] = like.new_empty(rows, width)
    return kept[key][:rows]
