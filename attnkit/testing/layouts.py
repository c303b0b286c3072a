"""Random layouts of every kind, as a function of a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from attnkit.arguments import is_count
from attnkit.errors import ConfigError, did_you_mean, shown
from attnkit.grid import Grid
from attnkit.layouts import Blocks, Dense, Layout, Stencil, TokenMask, TokenSets

Choice = TypeVar("Choice")


def random_layout(
    kind: str, grid: Grid, *, batch: int = 1, heads: int = 1, seed: int = 0, device: torch.device | str | None = None
) -> tuple[Layout, tuple[int, int]]:
    """Makes a layout of one kind that differs from seed to seed in everything that kind can express.

    Strides, borders and dilations; plain, shifted, dilated and permuted windows; routed regions; entries of -1 and
    repeated entries; tables shared by items and heads or not; sometimes a mask of keys, and queries that see nothing.

    Args:
        kind: `"dense"`, `"stencil"`, `"blocks"`, `"token_sets"` or `"token_mask"`.
        grid: how the keys lie, with one axis or more.
        batch: number of items the layout may vary over, >= 1.
        heads: number of heads the layout may vary over, >= 1.
        seed: any integer; equal seeds give equal layouts, and the global random state is neither read nor changed.
        device: where the layout's tensors live.

    Returns:
        The layout, and its numbers of queries and keys (Nq, Nk): attention over it takes q (batch, heads, Nq, D) and
        k, v (batch, heads, Nk, D).

    Raises:
        ConfigError: for another kind, no grid, a number of items or heads below 1, or no integer as seed.
    """
    if not isinstance(kind, str) or kind not in _MAKERS:
        raise ConfigError(
            f"unknown kind of layout {shown(kind)}{did_you_mean(kind, _MAKERS)} (kinds: {', '.join(_MAKERS)})"
        )
    if not isinstance(grid, Grid):
        raise ConfigError(f"random_layout needs a Grid, such as Grid(14, 14), but got {shown(grid)}")
    for name, count in (("batch", batch), ("heads", heads)):
        if not is_count(count, 1):
            raise ConfigError(f"random_layout({name}=...) must be an integer >= 1, but got {shown(count)}")
    if not is_count(seed, -(2**63)) or seed >= 2**63:
        raise ConfigError(f"random_layout(seed=...) must be an integer of 64 bits, but got {shown(seed)}")
    try:
        torch.zeros(0, device=device)
    except (RuntimeError, TypeError, AssertionError):
        raise ConfigError(
            f"random_layout needs a device that is there, such as 'cpu', but got {shown(device)}"
        ) from None
    dice = Dice(torch.Generator().manual_seed(seed), batch, heads, device)
    layout = _MAKERS[kind](grid, dice)
    if dice.one_in(3):
        layout = layout.restrict(dice.mask(layout.num_keys))
    return layout, (layout.num_queries, layout.num_keys)


@dataclass(frozen=True)
class Dice:
    """A source of chance that leaves PyTorch's own alone."""

    generator: torch.Generator
    batch: int
    heads: int
    device: torch.device | str | None

    def integer(self, low: int, high: int) -> int:
        """One of low..high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def one_in(self, count: int) -> bool:
        """True once in `count` times."""
        return self.integer(1, count) == 1

    def pick(self, choices: Sequence[Choice]) -> Choice:
        """One of several things."""
        return choices[self.integer(0, len(choices) - 1)]

    def axes(self, grid: Grid, low: int, high: int) -> tuple[int, ...]:
        """One number of low..high per axis."""
        return tuple(self.integer(low, high) for _ in grid.sizes)

    def lead(self) -> tuple[int, int]:
        """(B or 1, heads or 1)."""
        return self.pick((1, self.batch)), self.pick((1, self.heads))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Numbers of low..high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator).to(self.device)

    def chances(self, share: float, *shape: int) -> Tensor:
        """Bools that are True with probability `share`."""
        return (torch.rand(shape, generator=self.generator) < share).to(self.device)

    def permutations(self, count: int, length: int) -> Tensor:
        """Permutations of 0..length-1: int64 (count, length)."""
        return torch.rand(count, length, generator=self.generator).argsort(-1).to(self.device)

    def mask(self, keys: int) -> Tensor:
        """A mask of keys in one of its forms; now and then an item is left without any key."""
        lead = self.pick(((), (self.batch,), self.lead()))
        kept = self.chances(0.7, *lead, keys)
        if self.one_in(4):
            kept = kept & self.chances(0.5, *lead, 1)
        return kept


def _dense(grid: Grid, dice: Dice) -> Layout:
    keys = dice.pick((None, grid.tokens, dice.integer(1, grid.tokens)))
    return Dense(grid.tokens, keys)


def _stencil(grid: Grid, dice: Dice) -> Layout:
    kernel = tuple(2 * half + 1 for half in dice.axes(grid, 0, 3))
    stride = dice.pick((1, dice.axes(grid, 1, 3)))
    dilation = dice.pick((1, dice.axes(grid, 1, 3)))
    return Stencil(grid, kernel, stride=stride, dilation=dilation, border=dice.pick(("mask", "clamp")))


def _blocks(grid: Grid, dice: Dice) -> Layout:
    form = dice.pick(("plain", "shifted", "dilated", "permuted", "routed", "routed", "crossed"))
    window = dice.axes(grid, 1, 4)
    if form == "permuted":
        return _permuted(grid, dice)
    if form == "routed":
        regions = dice.axes(grid, 1, 3)
        return Blocks.from_regions(grid, regions, _routes(math.prod(regions), math.prod(regions), dice))
    if form == "crossed":
        queries = Blocks.windows(grid, window, device=dice.device)
        keys = Blocks.windows(grid, dice.axes(grid, 1, 4), dilated=True, device=dice.device)
        index = _routes(queries.num_blocks, keys.num_blocks, dice)
        return Blocks(queries.order, index, prefix=grid.prefix, key_order=keys.order)
    shift = dice.axes(grid, 1, 3) if form == "shifted" else None
    return Blocks.windows(grid, window, shift=shift, dilated=form == "dilated", device=dice.device)


def _permuted(grid: Grid, dice: Dice) -> Layout:
    length = grid.image_tokens
    window = dice.integer(1, length + 1)
    if dice.one_in(2):
        return Blocks.permuted(dice.permutations(1, length)[0], window, prefix=grid.prefix)
    batch, heads = dice.lead()
    permutation = dice.permutations(batch * heads, length).view(batch, heads, length)
    layout = Blocks.permuted(permutation, window, prefix=grid.prefix)
    if dice.one_in(2):
        return layout
    return Blocks(layout.order, _routes(layout.num_blocks, layout.num_blocks, dice), prefix=grid.prefix)


def _routes(rows: int, blocks: int, dice: Dice) -> Tensor:
    """An index of key blocks with entries of -1 and repeated ones, in one of its forms."""
    count = dice.integer(1, blocks + 1)
    lead = dice.pick(((), (dice.batch,), dice.lead()))
    index = dice.integers(-1 if dice.one_in(2) else 0, blocks - 1, *lead, rows, count)
    return index.int() if dice.one_in(3) else index


def _token_sets(grid: Grid, dice: Dice) -> Layout:
    keys = dice.pick((grid.tokens, dice.integer(max(1, grid.prefix), grid.tokens + 2)))
    lead = dice.pick(((), (dice.heads,), dice.lead()))
    if len(lead) == 1:
        lead = dice.pick((lead, (1, *lead)))
    index = dice.integers(-1, keys - 1, *lead, grid.image_tokens, dice.integer(0, min(keys + 1, 7)))
    if dice.one_in(2):
        index = index.where(dice.chances(0.6, *lead, grid.image_tokens, 1), -1)
    index = index.int() if dice.one_in(3) else index
    keys_all = dice.pick((0, min(grid.prefix, keys)))
    groups = _groups(grid.image_tokens, dice)
    return TokenSets(index, keys, queries_all=grid.prefix, keys_all=keys_all, query_groups=groups)


def _token_mask(grid: Grid, dice: Dice) -> Layout:
    keys = dice.pick((grid.tokens, dice.integer(1, grid.tokens + 2)))
    lead = dice.pick(((), (dice.heads,), dice.lead()))
    mask = dice.chances(dice.pick((0.1, 0.5, 0.9)), *lead, grid.tokens, keys)
    if dice.one_in(2):
        mask = mask & dice.chances(0.7, *lead, grid.tokens, 1)
    return TokenMask(mask, query_groups=_groups(grid.tokens, dice))


def _groups(queries: int, dice: Dice) -> Tensor | None:
    """Groups in one of their forms, of queries that may share nothing."""
    if dice.one_in(2):
        return None
    groups = dice.integers(-1, 3, *dice.pick(((), (dice.heads,), dice.lead())), queries)
    if groups.ndim > 1 and dice.one_in(3):
        groups = groups.mT.contiguous().mT
    return groups.int() if dice.one_in(3) else groups


_MAKERS: dict[str, Callable[[Grid, Dice], Layout]] = {
    "dense": _dense,
    "stencil": _stencil,
    "blocks": _blocks,
    "token_sets": _token_sets,
    "token_mask": _token_mask,
}

KINDS = tuple(_MAKERS)
