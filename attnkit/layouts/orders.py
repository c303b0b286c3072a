"""Orders: how the tokens of a grid are cut into blocks of equal size."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnkit.grid import Grid
from attnkit.layouts.base import form_of
from attnkit.layouts.cache import cached, device_key


@dataclass(frozen=True, eq=False)
class Order:
    """A cut of N image tokens into R blocks of T slots.

    Attributes:
        token: token in each slot, int64 (B or 1, heads or 1, R, T), leading dimensions may be left out; -1 in slots
            left empty. Tokens are numbered over the whole row, so the first image token is `prefix`.
        slot: slot of each image token, int64 (B or 1, heads or 1, N), leading dimensions as in `token`, in
            0..R*T-1.
        padded: whether any slot may be empty.
        made_of: the grid and how each of its axes was cut, where that made the order; None for any other order.
    """

    token: Tensor
    slot: Tensor
    padded: bool
    made_of: tuple[Grid, tuple[AxisCut, ...]] | None = None

    @cached_property
    def form(self) -> Hashable:
        """What can be known of the order without looking at its numbers."""
        return form_of(self.token), form_of(self.slot), self.padded

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "form"}


@dataclass(frozen=True)
class AxisCut:
    """How one axis of `size` tokens falls into `blocks` runs of `length` slots.

    A `dilated` cut puts every `blocks`-th token into one run; otherwise a run holds neighbours, the first run
    starting `shift` slots before the first token.
    """

    size: int
    blocks: int
    length: int
    shift: int = 0
    dilated: bool = False

    @property
    def step(self) -> int:
        """Tokens from a slot to the next one."""
        return self.blocks if self.dilated else 1

    def places(self, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        """Block and slot of every position, two int64 tensors of shape (size,)."""
        position = torch.arange(self.size, device=device)
        if self.dilated:
            return position % self.blocks, position // self.blocks
        return (position + self.shift) // self.length, (position + self.shift) % self.length


def region_cuts(grid: Grid, regions: tuple[int, ...]) -> tuple[AxisCut, ...]:
    """Cuts every axis into a fixed number of regions of ceil(size / regions) tokens; late regions may be empty."""
    return tuple(AxisCut(n, r, -(-n // r)) for n, r in zip(grid.sizes, regions, strict=True))


def window_cuts(grid: Grid, window: tuple[int, ...], shift: tuple[int, ...]) -> tuple[AxisCut, ...]:
    """Cuts every axis into windows of a fixed number of tokens; a window over the whole axis is not shifted."""
    cuts = []
    for size, wanted, offset in zip(grid.sizes, window, shift, strict=True):
        length = min(wanted, size)
        before = 0 if length == size else (length - offset) % length
        cuts.append(AxisCut(size, -(-(size + before) // length), length, before))
    return tuple(cuts)


def dilated_cuts(grid: Grid, window: tuple[int, ...]) -> tuple[AxisCut, ...]:
    """Cuts every axis into runs of at most `window` tokens spread evenly over it (grid attention)."""
    cuts = []
    for size, length in zip(grid.sizes, window, strict=True):
        blocks = -(-size // min(length, size))
        cuts.append(AxisCut(size, blocks, -(-size // blocks), dilated=True))
    return tuple(cuts)


def cut_order(grid: Grid, cuts: tuple[AxisCut, ...], device: torch.device | str | None) -> Order:
    """The order made by cutting every axis; blocks and the slots inside a block are numbered row-major."""
    count = math.prod([cut.blocks for cut in cuts])
    length = math.prod([cut.length for cut in cuts])

    def make() -> tuple[Tensor, Tensor]:
        block = torch.zeros((1,) * grid.ndim, dtype=torch.int64, device=device)
        inner = torch.zeros((1,) * grid.ndim, dtype=torch.int64, device=device)
        for axis, cut in enumerate(cuts):
            shape = [1] * grid.ndim
            shape[axis] = cut.size
            outer_place, inner_place = cut.places(device)
            block = block * cut.blocks + outer_place.view(shape)
            inner = inner * cut.length + inner_place.view(shape)
        slot = (block * length + inner).reshape(-1)
        token = torch.full((count * length,), -1, dtype=torch.int64, device=device)
        token = token.scatter(0, slot, torch.arange(grid.image_tokens, device=device) + grid.prefix)
        return token.view(1, 1, count, length), slot.view(1, 1, -1)

    token, slot = cached(("cut", grid, cuts, device_key(device)), make)
    return Order(token, slot, padded=count * length > grid.image_tokens, made_of=(grid, cuts))


def permuted_order(permutation: Tensor, window: int, prefix: int) -> Order:
    """Cuts a permuted row of image tokens into windows of `window` tokens; the last one may be partly empty.

    Args:
        permutation: int64 (..., N), every image token 0..N-1 once.
        window: tokens per window, >= 1; at most N are used.
        prefix: number of prefix tokens before the image tokens.
    """
    tokens = permutation.shape[-1]
    window = min(window, tokens)
    count = -(-tokens // window)
    empty = count * window - tokens
    place = torch.arange(tokens, device=permutation.device).expand_as(permutation)
    slot = torch.empty_like(permutation).scatter(-1, permutation, place)
    token = permutation + prefix
    if empty:
        token = torch.cat([token, token.new_full((*token.shape[:-1], empty), -1)], dim=-1)
    return Order(token.unflatten(-1, (count, window)), slot, padded=empty > 0)
