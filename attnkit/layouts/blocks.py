"""Blocks: tokens cut into blocks, and for every block of queries a list of blocks of keys."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attnkit.arguments import is_count
from attnkit.errors import LayoutError, ShapeError, shown
from attnkit.grid import Grid, Sizes
from attnkit.layouts.base import Layout, common_lead, form_of, framed
from attnkit.layouts.cache import cached_layout, device_key
from attnkit.layouts.orders import (
    Order,
    cut_order,
    dilated_cuts,
    permuted_order,
    region_cuts,
    window_cuts,
)
from attnkit.layouts.token_sets import check_range, gathered_keys, may_look, without_repeats


@dataclass(frozen=True, eq=False)
class Blocks(Layout):
    """The queries of block r see all keys of the blocks `index[..., r, :]`, or of their own block without an index.

    Windows, shifted windows, grid attention, stripes, random windows and routed regions differ only in the order and
    the index. Prefix tokens see all and are seen by all.

    Args:
        order: the cut of the queries' tokens, tables with up to four dimensions (B or 1, heads or 1, R, T).
        index: integer (B or 1, heads or 1, R, K) key blocks, -1 for none, a repeated block counting once; None: every
            block sees itself.
        prefix: number of prefix tokens.
        key_order: the cut of the keys' tokens, where it is another than the queries'.

    Raises:
        LayoutError: for tables whose shapes or dtypes do not fit, or entries out of range (looked at on the CPU only).
    """

    kind: ClassVar[str] = "blocks"

    order: Order
    index: Tensor | None = None
    prefix: int = field(default=0, kw_only=True)
    key_order: Order | None = field(default=None, kw_only=True)
    unique: bool = field(default=False, kw_only=True, repr=False)
    key_mask: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not is_count(self.prefix):
            raise LayoutError(f"Blocks needs an integer >= 0 as prefix, but got {shown(self.prefix)}")
        if self.order is not (order := _four_dimensional(self.order)):
            object.__setattr__(self, "order", order)
        if self.key_order is not None:
            object.__setattr__(self, "key_order", _four_dimensional(self.key_order))
        if self.index is None:
            if self.keys_cut.token.shape[2] != self.order.token.shape[2]:
                raise LayoutError("Blocks without an index needs as many blocks of keys as of queries")
            super().__post_init__()
            return
        index = self.index
        _check_index(index, self.num_blocks)
        index = index[None, None] if index.ndim == 2 else index[:, None] if index.ndim == 3 else index
        if not self.unique:
            check_range(index, self.keys_cut.token.shape[2], "Blocks.index", "blocks")
            index = without_repeats(index)
        object.__setattr__(self, "index", index if index.dtype == torch.int64 else index.long())
        object.__setattr__(self, "unique", True)
        super().__post_init__()

    @classmethod
    def from_regions(cls, grid: Grid, regions_per_side: Sizes, index: Tensor, *, unique: bool = False) -> Blocks:
        """Routed regions: the grid is cut into regions_per_side regions an axis, and each sees those it is routed to.

        A region holds ceil(size / regions_per_side) tokens an axis; where that does not divide, late regions hold
        fewer tokens or none.

        Args:
            grid: the grid of queries and keys.
            regions_per_side: regions along each axis, one number or one per axis.
            index: integer (B or 1, R, topk) or (B or 1, heads or 1, R, topk) with regions numbered row-major,
                -1 for none.
            unique: promises that no region stands twice in a row and all are in range, so that nothing is checked.
        """
        regions = _per_axis(grid, regions_per_side, "regions_per_side")
        _check_index(index, math.prod(regions))
        order = cut_order(grid, region_cuts(grid, regions), index.device)
        return cls(order, index, prefix=grid.prefix, unique=unique)

    @classmethod
    def windows(
        cls,
        grid: Grid,
        window: Sizes,
        *,
        shift: Sizes | None = None,
        dilated: bool = False,
        device: torch.device | str | None = None,
    ) -> Blocks:
        """Windows of `window` tokens an axis: plain, shifted by `shift` tokens, or dilated (grid attention)."""
        sides = _per_axis(grid, window, "window")
        offset = (0,) * grid.ndim
        if shift is not None and not (is_count(shift) and shift == 0):
            offset = _per_axis(grid, shift, "shift")

        def make() -> Blocks:
            cuts = dilated_cuts(grid, sides) if dilated else window_cuts(grid, sides, offset)
            return cls(cut_order(grid, cuts, device), prefix=grid.prefix)

        return cached_layout(("windows", cls, grid, sides, offset, bool(dilated), device_key(device)), make)

    @classmethod
    def permuted(cls, permutation: Tensor, window: int, *, prefix: int = 0) -> Blocks:
        """Windows of `window` tokens in a permuted row: permutation int64 (N,) or (B or 1, heads or 1, N).

        That every token stands in it once is looked at on the CPU only.
        """
        shaped = isinstance(permutation, Tensor) and permutation.ndim in (1, 3) and permutation.shape[-1] > 0
        if not shaped or permutation.dtype != torch.int64 or not is_count(window, 1) or not is_count(prefix):
            raise LayoutError(
                f"Blocks.permuted needs an int64 permutation (N,) or (B, heads, N), a window >= 1 and a prefix >= 0, "
                f"but got {shown(permutation)}, {shown(window)} and {shown(prefix)}"
            )
        check_permutation(permutation)
        return cls(permuted_order(permutation, window, prefix), prefix=prefix)

    def own_form(self) -> Hashable:
        keys = None if self.key_order is None else self.key_order.form
        return self.order.form, keys, form_of(self.index), self.prefix

    @property
    def own_tables(self) -> tuple[Tensor, ...]:
        routes = () if self.index is None else (self.index,)
        return (self.order.token, self.keys_cut.token, *routes)

    @property
    def keys_cut(self) -> Order:
        """The cut of the keys' tokens."""
        return self.order if self.key_order is None else self.key_order

    @property
    def num_blocks(self) -> int:
        """Number of blocks of queries, R."""
        return self.order.token.shape[2]

    @property
    def num_queries(self) -> int:
        return self.prefix + self.order.slot.shape[-1]

    @property
    def num_keys(self) -> int:
        return self.prefix + self.keys_cut.slot.shape[-1]

    @property
    def global_queries(self) -> int:
        return self.prefix

    @property
    def global_keys(self) -> int:
        return self.prefix

    @property
    def key_slots(self) -> int:
        return self.prefix + self.keys_cut.token.shape[3] * (1 if self.index is None else self.index.shape[-1])

    @property
    def full(self) -> bool:
        return self.num_blocks == 1 and self.index is None and not self.keys_cut.padded and self.key_mask is None

    def key_tokens(self) -> Tensor:
        """Key token in every place a block of queries sees: int64 (B or 1, heads or 1, R, K * T), -1 for none."""
        token = self.keys_cut.token
        if self.index is None:
            return token
        shape = _lead(token, self.index)
        rows = self.index.clamp(min=0).expand(*shape, -1, -1)
        places = rows.flatten(2)[..., None].expand(-1, -1, -1, token.shape[3])
        found = token.expand(*shape, -1, -1).gather(2, places)
        found = found.unflatten(2, (rows.shape[2], rows.shape[3]))
        return torch.where(self.index[..., None] < 0, -1, found).flatten(3)

    def to_mask(self, device: torch.device | str | None = None) -> Tensor:
        return self._masked(framed(self.image_mask(), self.prefix, self.prefix))

    def image_mask(self) -> Tensor:
        """Which image keys stand in a block that an image query's block sees, whether or not they are masked: bool
        (B or 1, heads or 1, Nq - prefix, Nk - prefix).
        """
        keys, queries = self.keys_cut, self.order
        count = keys.token.shape[2]
        if self.index is None:
            sees = torch.eye(count, dtype=torch.bool, device=keys.token.device)[None, None]
        else:
            spots = torch.where(self.index < 0, count, self.index)
            empty = torch.zeros((*spots.shape[:-1], count + 1), dtype=torch.bool, device=spots.device)
            sees = empty.scatter(-1, spots, True)[..., :count]
        shape = _lead(sees, queries.slot, keys.slot)
        query_block = queries.slot // queries.token.shape[3]
        key_block = query_block if keys is queries else keys.slot // keys.token.shape[3]
        query_block, key_block = (one.expand(*shape, -1) for one in (query_block, key_block))
        rows = sees.expand(*shape, -1, -1).gather(2, query_block[..., None].expand(-1, -1, -1, count))
        return rows.gather(3, key_block[:, :, None].expand(-1, -1, rows.shape[2], -1))

    def visible(self) -> Tensor:
        tokens = self.key_tokens()
        valid = tokens >= 0
        if self.key_mask is not None:
            valid = valid & gathered_keys(self.key_mask, tokens)
        per_block = valid.sum(-1)
        shape = _lead(per_block, self.order.slot)
        block = (self.order.slot // self.order.token.shape[3]).expand(*shape, -1)
        count = per_block.expand(*shape, -1).gather(2, block)
        if self.key_mask is None:
            count = count + self.prefix
        else:
            count = count + self.key_mask[..., : self.prefix].sum(-1)[..., None]
        everything = self._all_visible(self.prefix, count).expand(*count.shape[:2], -1)
        return torch.cat([everything, count], dim=-1)


def _lead(*tables: Tensor) -> tuple[int, int]:
    # torch.broadcast_shapes takes as long as several operators.
    return common_lead("tables of blocks", *(tuple(table.shape[:2]) for table in tables))


def check_permutation(permutation: Tensor) -> None:
    """Raises `LayoutError` unless every number 0..N-1 stands in the last dimension once, where looking is cheap."""
    if not may_look(permutation):
        return
    numbers = torch.arange(permutation.shape[-1], device=permutation.device)
    if not torch.equal(permutation.sort(-1).values, numbers.expand_as(permutation)):
        low, high = torch.aminmax(permutation)
        raise LayoutError(
            f"Blocks.permuted needs every number in 0..{len(numbers) - 1} once, "
            f"but got {tuple(permutation.shape)} that holds {int(low)}..{int(high)}, some of them missing or twice"
        )


def _per_axis(grid: Grid, value: Sizes, what: str) -> tuple[int, ...]:
    if not isinstance(grid, Grid):
        raise LayoutError(f"Blocks needs a Grid, such as Grid(14, 14), but got {shown(grid)}")
    try:
        return grid.per_axis(value, what)
    except ShapeError as error:
        raise LayoutError(str(error)) from None


def _check_index(index: Tensor, rows: int) -> None:
    shaped = isinstance(index, Tensor) and index.ndim in (2, 3, 4)
    if not shaped or index.dtype not in (torch.int64, torch.int32):
        raise LayoutError(f"Blocks.index needs an integer tensor (B or 1, heads or 1, R, K), but got {shown(index)}")
    if index.shape[-2] != rows:
        raise LayoutError(f"Blocks.index has {index.shape[-2]} rows but there are {rows} blocks of queries")


def _four_dimensional(order: Order) -> Order:
    if not isinstance(order, Order) or not isinstance(order.token, Tensor) or not isinstance(order.slot, Tensor):
        raise LayoutError(
            f"Blocks needs an order such as that of Blocks.windows(grid, 7), but got {shown(order)}; "
            f"Blocks.windows, Blocks.permuted and Blocks.from_regions make blocks from less"
        )
    token, slot = order.token, order.slot
    if token.ndim == 4:
        return order
    if token.ndim != 2 or math.prod(token.shape) < slot.shape[-1]:
        raise LayoutError(
            f"Blocks needs an order of shape (R, T) or (B or 1, heads or 1, R, T), but got {tuple(token.shape)}"
        )
    return Order(token[None, None], slot[None, None], order.padded, order.made_of)
