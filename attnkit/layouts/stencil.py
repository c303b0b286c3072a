"""Stencil: every query sees a window of the grid around its own place."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attnkit.errors import LayoutError, ShapeError, shown
from attnkit.grid import Grid, Sizes
from attnkit.layouts.base import Layout, framed
from attnkit.layouts.cache import cached, device_key
from attnkit.layouts.token_sets import gathered_keys


@dataclass(frozen=True, eq=False)
class Stencil(Layout):
    """A query at position p sees the keys at p * stride + dilation * t for -kernel//2 <= t <= kernel//2.

    Prefix tokens see all and are seen by all. With stride s the queries form a grid of ceil(size / s).

    Args:
        grid: the keys' grid, with its prefix.
        kernel: window size in tokens, odd; one number or one per axis. It may exceed the grid.
        stride: step between queries in tokens, >= 1; one number or one per axis.
        dilation: step between the keys of a window in tokens, >= 1; one number or one per axis.
        border: what happens at the edge. `"mask"`: keys outside the grid are left out. `"clamp"`: the window is moved
            inside, so every query sees `kernel` keys per axis (neighborhood attention).

    Raises:
        LayoutError: for an even kernel, another border, or numbers that do not fit the grid's axes.
    """

    kind: ClassVar[str] = "stencil"

    grid: Grid
    kernel: Sizes
    stride: Sizes = field(default=1, kw_only=True)
    dilation: Sizes = field(default=1, kw_only=True)
    border: Literal["mask", "clamp"] = field(default="mask", kw_only=True)
    key_mask: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.grid, Grid):
            raise LayoutError(f"Stencil needs a Grid, such as Grid(14, 14), but got {shown(self.grid)}")
        for name in ("kernel", "stride", "dilation"):
            try:
                object.__setattr__(self, name, self.grid.per_axis(getattr(self, name), f"Stencil {name}"))
            except ShapeError as error:
                raise LayoutError(str(error)) from None
        if not all(size % 2 for size in self.kernels):
            raise LayoutError(f"Stencil kernel must be odd so that a query is its centre, but got {self.kernel}")
        if not isinstance(self.border, str) or self.border not in ("mask", "clamp"):
            raise LayoutError(f"Stencil border must be 'mask' or 'clamp', but got {shown(self.border)}")
        super().__post_init__()

    def own_form(self) -> Hashable:
        return self.grid, self.kernel, self.stride, self.dilation, self.border

    @property
    def made_of(self) -> Hashable | None:  # type: ignore[override]
        return None if self.key_mask is not None else ("stencil", type(self), self.own_form())

    @property
    def kernels(self) -> tuple[int, ...]:
        """Kernel per axis."""
        return self.grid.per_axis(self.kernel, "kernel")

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride per axis."""
        return self.grid.per_axis(self.stride, "stride")

    @property
    def dilations(self) -> tuple[int, ...]:
        """Dilation per axis."""
        return self.grid.per_axis(self.dilation, "dilation")

    @property
    def query_grid(self) -> Grid:
        """The grid of the queries."""
        return self.grid.strided(self.stride)

    @property
    def num_queries(self) -> int:
        return self.query_grid.tokens

    @property
    def num_keys(self) -> int:
        return self.grid.tokens

    @property
    def global_queries(self) -> int:
        return self.grid.prefix

    @property
    def global_keys(self) -> int:
        return self.grid.prefix

    @property
    def key_slots(self) -> int:
        return self.grid.prefix + math.prod(self.kernels)

    def taps(self, device: torch.device | str | None = None) -> Tensor:
        """Key token of every window place of every image query: int64 (Nq - prefix, K), row-major, -1 outside."""

        def make() -> tuple[Tensor]:
            total = torch.zeros(1, 1, dtype=torch.int64, device=device)
            inside = torch.ones(1, 1, dtype=torch.bool, device=device)
            for axis, size in enumerate(self.grid.sizes):
                key = self.axis_taps(axis, device)
                good = (key >= 0) & (key < size)
                total = (total[:, None, :, None] * size + key[None, :, None, :]).flatten(0, 1).flatten(1)
                inside = (inside[:, None, :, None] & good[None, :, None, :]).flatten(0, 1).flatten(1)
            return (torch.where(inside, total + self.grid.prefix, -1),)

        key = ("taps", self.grid, self.kernel, self.stride, self.dilation, self.border, device_key(device))
        return cached(key, make)[0]

    def axis_taps(self, axis: int, device: torch.device | str | None) -> Tensor:
        """Key positions (queries, kernel) along one axis; outside the axis means no key."""
        size, kernel = self.grid.sizes[axis], self.kernels[axis]
        step = self.dilations[axis]
        centre = torch.arange(self.query_grid.sizes[axis], device=device) * self.strides[axis]
        place = torch.arange(kernel, device=device)
        if self.border == "mask":
            return centre[:, None] + (place - kernel // 2) * step
        # Tokens of equal remainder modulo the dilation form a grid of their own; the window moves inside that one.
        remainder, inner = centre % step, centre // step
        length = (size - remainder + step - 1) // step
        start = torch.minimum(inner - kernel // 2, length - kernel).clamp(min=0)
        spot = start[:, None] + place
        return torch.where(spot < length[:, None], spot * step + remainder[:, None], -1)

    def to_mask(self, device: torch.device | str | None = None) -> Tensor:
        device = device if self.key_mask is None else self.key_mask.device
        taps = self.taps(device)
        spots = torch.where(taps < 0, self.num_keys, taps)
        mask = torch.zeros(spots.shape[0], self.num_keys + 1, dtype=torch.bool, device=device)
        mask = mask.scatter(-1, spots, torch.ones((), dtype=torch.bool, device=device).expand_as(spots))
        inner = mask[None, None, :, self.grid.prefix : self.num_keys]
        return self._masked(framed(inner, self.grid.prefix, self.grid.prefix))

    def visible(self) -> Tensor:
        device = None if self.key_mask is None else self.key_mask.device
        taps = self.taps(device)[None, None]
        valid = taps >= 0
        count = valid.sum(-1) + self.grid.prefix
        if self.key_mask is not None:
            kept = gathered_keys(self.key_mask, taps) & valid
            count = kept.sum(-1) + self.key_mask[..., : self.grid.prefix].sum(-1)[..., None]
        everything = self._all_visible(self.grid.prefix, taps)
        return torch.cat([everything.expand(*count.shape[:2], -1), count], dim=-1)
