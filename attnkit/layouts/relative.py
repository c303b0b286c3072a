"""RelativeTable: a learned number per head and offset, for biases and gains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.arguments import NamedArguments
from attnkit.errors import LayoutError, ShapeError, shown
from attnkit.grid import Grid, Sizes
from attnkit.layouts.cache import cached


@dataclass(frozen=True, eq=False)
class RelativeTable(metaclass=NamedArguments):
    """A value for every (query, key) pair that depends on the head and on where the key lies from the query.

    `value[h, i, j] = table[h, key(j) - stride * query(i) + extent // 2]` inside the table, and `fill` for offsets
    outside it and for every pair with a prefix token. Holds relative position biases (Swin, NATTEN, QnA) and QnA's
    gains.

    Args:
        table: float (heads, extent, ...), one odd extent per axis of the grid; the middle is offset 0.
        grid: the keys' grid.
        stride: step between queries in tokens, as in `Stencil`.
        fill: value outside the table: 0 for a bias, 1 for a gain.

    Raises:
        LayoutError: if the table's axes do not match the grid, or an extent is even.
    """

    _refusal = LayoutError

    table: Tensor
    grid: Grid
    stride: Sizes = 1
    fill: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.grid, Grid):
            raise LayoutError(f"RelativeTable needs a Grid, such as Grid(14, 14), but got {shown(self.grid)}")
        shaped = isinstance(self.table, Tensor) and self.table.ndim == self.grid.ndim + 1
        odd = shaped and all(extent % 2 for extent in self.table.shape[1:])
        if not odd or not self.table.is_floating_point():
            raise LayoutError(
                f"RelativeTable needs a floating table (heads, odd extent per axis of {self.grid}), "
                f"but got {shown(self.table)}"
            )
        if not isinstance(self.fill, (int, float)) or isinstance(self.fill, bool):
            raise LayoutError(f"RelativeTable needs a number as fill, but got {shown(self.fill)}")
        try:
            self.grid.per_axis(self.stride, "RelativeTable stride")
        except ShapeError as error:
            raise LayoutError(str(error)) from None

    def lookup(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Values for pairs of tokens.

        Args:
            queries: int64 token numbers, prefix included, shape (B or 1, heads or 1, ...).
            keys: int64 token numbers that broadcast with `queries`; negative numbers count as outside.

        Returns:
            Values of shape (B or 1, heads, ...), differentiable with respect to the table.
        """
        spot = self._spots(queries, keys)
        heads = self.table.shape[0]
        values = self._edged()
        if spot.shape[0] == 1 and spot.shape[1] == 1:
            return values[:, spot[0, 0]][None]
        spot = spot.expand(-1, heads, *spot.shape[2:])
        return values[None].expand(spot.shape[0], -1, -1).gather(2, spot.flatten(2)).view(spot.shape)

    def dense(self, num_queries: int) -> Tensor:
        """Values of all pairs: (1, heads, Nq, Nk)."""
        device = self.table.device

        def make() -> tuple[Tensor]:
            queries = torch.arange(num_queries, device=device)[None, None, :, None]
            keys = torch.arange(self.grid.tokens, device=device)[None, None, None, :]
            return (self._spots(queries, keys),)

        key = ("relative", tuple(self.table.shape[1:]), self.grid, self.stride, num_queries, str(device))
        spot = cached(key, make)[0]
        return self._edged()[:, spot[0, 0]][None]

    def fits(self, grid: Grid, stride: Sizes) -> bool:
        """Whether the table is for the keys of a grid and for queries that are `stride` apart."""
        return self.grid == grid and grid.per_axis(self.stride, "stride") == grid.per_axis(stride, "stride")

    def window(self, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
        """Values at the places of a window around a query, row-major: (heads, places).

        Args:
            kernel: places per axis, odd.
            dilation: tokens between them per axis.
        """
        device = self.table.device

        def make() -> tuple[Tensor]:
            spot = torch.zeros(1, dtype=torch.int64, device=device)
            inside = torch.ones(1, dtype=torch.bool, device=device)
            for extent, size, step in zip(self.table.shape[1:], kernel, dilation, strict=True):
                offset = (torch.arange(size, device=device) - size // 2) * step + extent // 2
                spot = (spot[:, None] * extent + offset).flatten()
                inside = (inside[:, None] & (offset >= 0) & (offset < extent)).flatten()
            return (torch.where(inside, spot, math.prod(self.table.shape[1:])),)

        spot = cached(("window", tuple(self.table.shape[1:]), kernel, dilation, str(device)), make)[0]
        return self._edged()[:, spot]

    def within(self, prefix: int, sides: tuple[tuple[int, int], ...]) -> Tensor:
        """Values inside a window, between any two of its slots, row-major: (heads, slots, prefix + slots).

        Args:
            prefix: number of prefix tokens, which are keys before those of the window.
            sides: slots per axis, and tokens from one slot to the next.
        """
        device = self.table.device

        def make() -> tuple[Tensor]:
            slots = torch.zeros((1, 1), dtype=torch.int64, device=device)
            inside = torch.ones((1, 1), dtype=torch.bool, device=device)
            for extent, (side, step) in zip(self.table.shape[1:], sides, strict=True):
                place = torch.arange(side, device=device) * step
                offset = place[None, :] - place[:, None] + extent // 2
                kept = (offset >= 0) & (offset < extent)
                count = len(slots) * side
                slots = (slots[:, None, :, None] * extent + offset[:, None]).view(count, count)
                inside = (inside[:, None, :, None] & kept[:, None]).view(count, count)
            entries = math.prod(self.table.shape[1:])
            spot = torch.where(inside, slots, entries)
            return (torch.cat([spot.new_full((len(spot), prefix), entries), spot], dim=1),)

        key = ("within", tuple(self.table.shape[1:]), prefix, sides, str(device))
        return self._edged()[:, cached(key, make)[0]]

    def _edged(self) -> Tensor:
        """(heads, entries + 1): all entries, and `fill`."""
        table = self.table
        if table.requires_grad and table.dtype.itemsize < 4:
            # The gradient of an entry is a sum over all pairs that read it: too long for half precision.
            table = table.float()
        edge = table.new_full((table.shape[0], 1), self.fill)
        return torch.cat([table.flatten(1), edge], dim=1)

    def _spots(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Flat position in the table of every pair; the number of entries stands for outside."""
        prefix = self.grid.prefix
        strides = self.grid.per_axis(self.stride, "stride")
        query_sizes = self.grid.strided(self.stride).sizes
        query, key = queries - prefix, keys - prefix
        inside = (query >= 0) & (key >= 0)
        spot, entries = torch.zeros_like(inside, dtype=torch.int64), 1
        for axis in reversed(range(self.grid.ndim)):
            extent = self.table.shape[1 + axis]
            offset = key % self.grid.sizes[axis] - query % query_sizes[axis] * strides[axis] + extent // 2
            key, query = key // self.grid.sizes[axis], query // query_sizes[axis]
            inside = inside & (offset >= 0) & (offset < extent)
            spot, entries = spot + offset * entries, entries * extent
        return torch.where(inside, spot, entries)
