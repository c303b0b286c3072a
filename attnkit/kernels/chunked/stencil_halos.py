"""Halos: a grid's queries cut into tiles, and the keys that any query of a tile sees under a stencil.

Along each axis, the tokens of one remainder modulo the dilation are cut into tiles of their own, since only they share
keys. A tile of the grid is a combination of one of each axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.layouts import Stencil
from attnkit.layouts.cache import cached

# Queries of a tile, about; as many along each axis.
TILE = 64


class Axis(NamedTuple):
    """One axis cut into A tiles of T queries that see U keys, each of them up to K.

    Attributes:
        query: position of each query of a tile (A, T), -1 where the tile is not full.
        key: position of each key of a tile (A, U), -1 where it sees fewer.
        place: at which place of a query's window a key of its tile stands (A, T, U), -1 where it is not seen.
        spot: which key of its tile a query finds at a place of its window (A, T, K), -1 where there is none.
    """

    query: Tensor
    key: Tensor
    place: Tensor
    spot: Tensor


class Halos:
    """The tiles of a stencil's grid.

    Args:
        layout: the stencil; its mask of keys is not looked at.

    Attributes:
        tiles: how many there are.
        slots: queries of a tile, T.
        keys: keys of a tile, U, the prefix tokens first.
        queries: queries of the image, outside the prefix.
        sizes: the grid of these queries; `ndim` is its number of axes.
        query: number of each query among them (tiles, T), -1 where a tile is not full; `full` where all are.
        slot: where among all tiles' queries (tiles * T) each query stands.
    """

    def __init__(self, layout: Stencil) -> None:
        grid = layout.grid
        self.prefix, self.kernels, self.ndim = grid.prefix, layout.kernels, grid.ndim
        self.sizes = layout.query_grid.sizes
        self.queries = math.prod(self.sizes)
        self.axes = [_axis(layout, axis) for axis in range(grid.ndim)]
        self.counts = [len(one.query) for one in self.axes]
        self.tiles = math.prod(self.counts)
        self.slots = math.prod(one.query.shape[1] for one in self.axes)
        self.keys = self.prefix + math.prod(one.key.shape[1] for one in self.axes)

        def make() -> tuple[Tensor, ...]:
            query = _tokens([one.query for one in self.axes], self.sizes)
            key = _tokens([one.key for one in self.axes], grid.sizes)
            slot = query.flatten().argsort(stable=True)[int((query < 0).sum()) :]
            # Any token where there is no key.
            return query, key.clamp(min=0) + self.prefix, slot

        self.query, self._key, self.slot = cached(("halos", TILE, layout.own_form()), make)
        self.full = self.query.numel() == self.queries

    def keys_of(self, first: int, last: int) -> Tensor:
        """Tokens of the keys of the tiles first..last-1 (tiles, U), any where there is none."""
        shared = torch.arange(self.prefix).expand(last - first, -1)
        return torch.cat([shared, self._key[first:last]], dim=1)

    def mask(self, first: int, last: int, like: Tensor) -> Tensor:
        """(tiles, T, U) of 0, and of -inf where a query does not see a key of its tile."""
        parts = [torch.where(one.place < 0, -torch.inf, 0.0).to(like.dtype) for one in self.axes]
        return F.pad(self._combined(parts, torch.add, first, last), (self.prefix, 0))

    def places(self, first: int, last: int) -> Tensor:
        """At which place of a query's window a key of its tile stands (tiles, T, U), any where it does not see it.

        Places are the prefix tokens and then those of the window, row-major.
        """
        inner = self._numbers([one.place for one in self.axes], self.kernels, first, last)
        shared = torch.arange(self.prefix).expand(*inner.shape[:2], -1)
        return torch.cat([shared, inner + self.prefix], dim=2)

    def spots(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Which key of its tile a query finds at each of its places (tiles, T, places), and whether there is one."""
        parts = [one.spot for one in self.axes]
        inner = self._numbers(parts, [one.key.shape[1] for one in self.axes], first, last)
        there = self._combined([one >= 0 for one in parts], torch.logical_and, first, last)
        shared = torch.arange(self.prefix).expand(*inner.shape[:2], -1)
        return torch.cat([shared, inner + self.prefix], dim=2), F.pad(there, (self.prefix, 0), value=True)

    def _numbers(self, parts: Sequence[Tensor], sizes: Sequence[int], first: int, last: int) -> Tensor:
        """Numbers (A, n, m) along every axis as row-major ones (tiles, all n, all m)."""
        steps = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        scaled = [part.clamp(min=0) * step for part, step in zip(parts, steps, strict=True)]
        return self._combined(scaled, torch.add, first, last)

    def _combined(
        self, parts: Sequence[Tensor], join: Callable[[Tensor, Tensor], Tensor], first: int, last: int
    ) -> Tensor:
        """Tables (A, n, m) of every axis for the tiles first..last-1: (tiles, all n, all m)."""
        tiles = torch.unravel_index(torch.arange(first, last), self.counts)
        found, *rest = (part[tile] for part, tile in zip(parts, tiles, strict=True))
        for part in rest:
            found = join(found[:, :, None, :, None], part[:, None, :, None, :]).flatten(3).flatten(1, 2)
        return found


def extent(layout: Stencil) -> tuple[int, int]:
    """About how many tiles a stencil's grid has, and how many keys a tile, prefix tokens not among them."""
    tiles, keys = 1, 1
    for axis, size in enumerate(layout.grid.sizes):
        step, stride = layout.dilations[axis], layout.strides[axis]
        # Neighbours of one remainder lie so many windows' steps apart.
        apart = stride // math.gcd(step, stride)
        lines = step // math.gcd(step, stride)
        line = -(-layout.query_grid.sizes[axis] // lines)
        cuts = -(-line // _about(layout))
        tiles *= cuts * lines
        keys *= min(-(-size // step), (-(-line // cuts) - 1) * apart + layout.kernels[axis])
    return tiles, keys


def _about(layout: Stencil) -> int:
    return max(1, round(TILE ** (1 / layout.grid.ndim)))


def _axis(layout: Stencil, axis: int) -> Axis:
    size, step, stride = layout.grid.sizes[axis], layout.dilations[axis], layout.strides[axis]
    about = _about(layout)

    def make() -> tuple[Tensor, ...]:
        taps = layout.axis_taps(axis, "cpu")
        taps = torch.where((taps >= 0) & (taps < size), taps, -1)
        remainder = torch.arange(len(taps)) * stride % step
        tiles: list[Tensor] = []
        for one in range(step):
            members = (remainder == one).nonzero().flatten()
            tiles += members.tensor_split(-(-len(members) // about)) if len(members) else ()
        seen = [near[near >= 0].unique() for near in (taps[tile] for tile in tiles)]
        query, key = (torch.nn.utils.rnn.pad_sequence(one, batch_first=True, padding_value=-1) for one in (tiles, seen))
        near = torch.where(query[..., None] >= 0, taps[query.clamp(min=0)], -2)
        met = near[:, :, None, :] == key[:, None, :, None]
        met &= key[:, None, :, None] >= 0
        found = [torch.where(met.any(over), met.byte().argmax(over), -1) for over in (3, 2)]
        return query, key, found[0], found[1]

    form = (size, layout.kernels[axis], step, stride, layout.border, about)
    return Axis(*cached(("halos along an axis", *form), make))


def _tokens(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Positions (A, n) along every axis as numbers of tokens (tiles, all n), -1 where one is."""
    found, there = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    for part, size in zip(parts, sizes, strict=True):
        found = (found[:, None, :, None] * size + part.clamp(min=0)[None, :, None, :]).flatten(2).flatten(0, 1)
        there = (there[:, None, :, None] & (part >= 0)[None, :, None, :]).flatten(2).flatten(0, 1)
    return torch.where(there, found, -1)
