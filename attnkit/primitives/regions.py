"""Regions: how a grid falls into regions, which of them match, and what stands for their keys and values."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.grid import Grid
from attnkit.layouts.orders import AxisCut, Order, cut_order
from attnkit.options import positive
from attnkit.primitives.base import BuildContext, Columns
from attnkit.primitives.pooling import cell_means
from attnkit.primitives.softmax import SoftmaxOptions

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class RegionOptions(SoftmaxOptions, ABC):
    """Base of the options of primitives that route between regions.

    Args:
        heads: number of heads, >= 1.
        regions: regions per side, >= 1 (their number is regions ** axes).
        topk: regions each region sees, >= 1; more than there are means all.
        qk_dim: width of the queries, and of the keys, of all heads together, a multiple of `heads`; None for the width
            of the values.
    """

    regions: int
    topk: int
    _: KW_ONLY
    qk_dim: int | None = None

    def problems(self) -> list[str]:
        found = super().problems() + positive(regions=self.regions, topk=self.topk, qk_dim=self.qk_dim)
        if self.qk_dim is not None and self.heads >= 1 and self.qk_dim % self.heads:
            found.append(f"qk_dim={self.qk_dim}: must be a multiple of heads={self.heads}")
        return found

    def columns(self, context: BuildContext) -> Columns:
        width = self.heads * context.head_dim
        narrow = width if self.qk_dim is None else self.qk_dim
        return Columns(q=narrow, k=narrow, v=width)


@dataclass(frozen=True)
class PooledRegionOptions(RegionOptions, ABC):
    """Base of the options of primitives that may also pool keys and values inside regions.

    Args:
        heads: number of heads, >= 1.
        regions: regions per side, >= 1 (their number is regions ** axes).
        topk: regions each region sees, >= 1; more than there are means all.
        pool: what the keys and values of a region are: `"none"`, those of its tokens; `"mean"` or `"max"`, per channel,
            of the cells that it is cut into. Needs `pool_cells` or `pool_size`.
        pool_cells: cells per side of a region, >= 1; where that does not divide, neighbours share a token.
        pool_size: or tokens per side of a cell, >= 1; tokens behind the last whole cell are in none.
    """

    _: KW_ONLY
    pool: Literal["none", "mean", "max"] = "none"
    pool_cells: int | None = None
    pool_size: int | None = None

    def problems(self) -> list[str]:
        found = super().problems() + positive(pool_cells=self.pool_cells, pool_size=self.pool_size)
        given = [name for name in ("pool_cells", "pool_size") if getattr(self, name) is not None]
        if self.pool == "none" and given:
            found.append(f"{given[0]}={getattr(self, given[0])}: goes with pool='mean' or pool='max'")
        if self.pool != "none" and len(given) != 1:
            found.append(f"pool={self.pool!r}: needs pool_cells or pool_size, one of the two")
        return found

    def spans(self, length: int) -> Spans:
        """First and last + 1 token of the cells along one side of a region of `length` tokens."""
        if self.pool_cells is not None:
            count = self.pool_cells
            return [(at * length // count, -(-(at + 1) * length // count)) for at in range(count)]
        size = min(self.pool_size or 1, length)
        return [(at * size, (at + 1) * size) for at in range(length // size)]


@dataclass(frozen=True)
class Regions:
    """How a grid falls into regions of equal size, of which late ones may be smaller or empty.

    Attributes:
        grid: the grid.
        sides: regions along each axis.
        lengths: tokens of a whole region along each axis.
    """

    grid: Grid
    sides: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def at_most(cls, grid: Grid, count: int) -> Regions:
        """`count` regions a side, of ceil(size / count) tokens: late ones may be empty."""
        return cls(grid, (count,) * grid.ndim, tuple(-(-size // count) for size in grid.sizes))

    @classmethod
    def at_least(cls, grid: Grid, count: int) -> Regions:
        """`count` regions a side or more, of floor(size / count) tokens but at least 1."""
        lengths = tuple(max(size // count, 1) for size in grid.sizes)
        return cls(grid, tuple(-(-size // length) for size, length in zip(grid.sizes, lengths, strict=True)), lengths)

    @property
    def count(self) -> int:
        """Number of regions, R."""
        return math.prod(self.sides)

    @property
    def tokens(self) -> int:
        """Tokens of a whole region, T."""
        return math.prod(self.lengths)

    @property
    def padded(self) -> Grid:
        """The grid of R whole regions, in which this one is the first corner."""
        return Grid(
            *(one * other for one, other in zip(self.sides, self.lengths, strict=True)), prefix=self.grid.prefix
        )

    def order(self, device: torch.device, grid: Grid | None = None) -> Order:
        """The tokens of every region; of `grid`, which may be larger, where it is given."""
        whole = self.grid if grid is None else grid
        cuts = tuple(AxisCut(*one) for one in zip(whole.sizes, self.sides, self.lengths, strict=True))
        return cut_order(whole, cuts, device)

    def means(self, rows: Tensor, token_mask: Tensor | None, groups: int = 1) -> tuple[Tensor, Tensor]:
        """Mean of every region's tokens, for groups of heads that route together.

        Args:
            rows: (B, heads, N, D).
            token_mask: bool (B, N), or None.
            groups: number of groups of heads.

        Returns:
            Means (B, groups, R, heads * D / groups), 0 where there is no token; number of tokens (B or 1, R).
        """
        flat = rows.transpose(1, 2).flatten(2)
        mean, counts = cell_means(flat, self.grid, self.sides, self.lengths, token_mask)
        return mean.unflatten(2, (groups, -1)).transpose(1, 2), counts

    def filled(self, rows: Tensor) -> Tensor:
        """The image part of (B, heads, N, D) on the padded grid, zeros behind the edge: (B, heads, *sizes, D)."""
        image = rows[:, :, self.grid.prefix :].unflatten(2, self.grid.sizes)
        pad = [0, 0]
        for size, whole in zip(reversed(self.grid.sizes), reversed(self.padded.sizes), strict=True):
            pad += [0, whole - size]
        return F.pad(image, pad) if any(pad) else image

    def present(self, token_mask: Tensor | None, device: torch.device) -> Tensor | None:
        """Which places of the padded grid hold a token: bool (B or 1, 1, *sizes, 1); None if all do."""
        if token_mask is None and self.padded == self.grid:
            return None
        if token_mask is None:
            token_mask = torch.ones(1, self.grid.tokens, dtype=torch.bool, device=device)
        return self.filled(token_mask[:, None, :, None])

    def parts(self, image: Tensor) -> Tensor:
        """(B, heads, *padded sizes, D) -> (B, heads, R, T, D)."""
        return _by_region(self._cut(image), self.grid.ndim)

    def pooled(
        self, image: Tensor, present: Tensor | None, options: PooledRegionOptions
    ) -> tuple[Tensor, Tensor | None]:
        """The cells of every region.

        Args:
            image: (B, heads, *padded sizes, D), 0 where there is no token.
            present: as `present` gives it.
            options: say what cells are and what stands for them.

        Returns:
            (B, heads, R, cells, D), 0 for cells without a token; which cells have one, bool (B or 1, R, cells), None if
            all do.
        """
        spans = [options.spans(length) for length in self.lengths]
        there = torch.ones_like(image[:1, :1, ..., :1], dtype=torch.bool) if present is None else present
        # Half precision overflows or stops counting within a large cell.
        total = partial(torch.sum, dtype=torch.promote_types(image.dtype, torch.float32))
        counts = self._reduced(there, spans, total)
        if options.pool == "mean":
            cells = (self._reduced(image, spans, total) / counts.clamp(min=1.0)).to(image.dtype)
        else:
            known = image if present is None else image.where(present, -torch.inf)
            cells = self._reduced(known, spans, torch.amax).where(counts > 0, 0.0)
        ndim = self.grid.ndim
        held = None if present is None else _by_region(counts > 0, ndim)[:, 0, ..., 0]
        return _by_region(cells, ndim), held

    def _cut(self, image: Tensor) -> Tensor:
        """(B, heads, *padded sizes, D) -> (B, heads, regions and length of the first axis, of the second, ..., D)."""
        for axis, pair in enumerate(zip(self.sides, self.lengths, strict=True)):
            image = image.unflatten(2 + 2 * axis, pair)
        return image

    def _reduced(self, image: Tensor, spans: list[Spans], reduce: Callable[..., Tensor]) -> Tensor:
        cut = self._cut(image)
        for axis, cells in enumerate(spans):
            dim = 3 + 2 * axis
            cut = torch.stack([reduce(cut.narrow(dim, start, stop - start), dim) for start, stop in cells], dim=dim)
        return cut


def _by_region(cut: Tensor, ndim: int) -> Tensor:
    """(B, heads, side, length, side, length, ..., D) -> (B, heads, regions, places in a region, D)."""
    sides, places = range(2, 2 + 2 * ndim, 2), range(3, 3 + 2 * ndim, 2)
    return cut.permute(0, 1, *sides, *places, cut.ndim - 1).flatten(2, 1 + ndim).flatten(3, 2 + ndim)


def best_regions(match: Tensor, counts: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The regions that match best among those that hold a token.

    Args:
        match: (B, groups, R, R), query regions in rows.
        counts: number of tokens of each region, (B or 1, R).
        topk: how many.

    Returns:
        Matches, -inf for none, and int64 regions, -1 for none, both (B, groups, R, at most topk) and best first.
    """
    match = match.masked_fill((counts == 0)[:, None, None, :], -torch.inf)
    best = match.topk(min(topk, match.shape[-1]), dim=-1)
    return best.values, torch.where(best.values == -torch.inf, -1, best.indices)


def rows_order(count: int, length: int, first: int, device: torch.device) -> Order:
    """An order of `count` blocks of `length` tokens that lie one behind the other, from token `first` on."""
    slot = torch.arange(count * length, device=device)
    return Order((slot + first).view(1, 1, count, length), slot.view(1, 1, -1), padded=False)
