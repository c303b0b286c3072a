"""Padding of whole maps with zeros that layers take for tokens like all others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.grid import Grid


def padded(
    x: Tensor, grid: Grid, multiple: int, token_mask: Tensor | None = None
) -> tuple[Tensor, Grid, Tensor | None]:
    """Adds zeros behind the end of every axis until its length is a multiple of a number.

    Args:
        x: tokens (B, N, C).
        grid: how they lie.
        multiple: what the lengths become multiples of, in tokens.
        token_mask: bool (B, N), or None; what is added is not masked.

    Returns:
        Tokens, grid and mask of the larger map; what came in, where nothing is missing.
    """
    missing = [-size % multiple for size in grid.sizes]
    if not any(missing):
        return x, grid, token_mask
    ends = [end for size in reversed(missing) for end in (0, size)]

    def larger(rows: Tensor, value: float) -> Tensor:
        image = F.pad(rows[:, grid.prefix :].unflatten(1, grid.sizes), [0, 0, *ends], value=value)
        return torch.cat([rows[:, : grid.prefix], image.flatten(1, grid.ndim)], dim=1)

    sizes = (size + more for size, more in zip(grid.sizes, missing, strict=True))
    mask = None if token_mask is None else larger(token_mask[..., None], True)[..., 0]
    return larger(x, 0.0), Grid(*sizes, prefix=grid.prefix), mask


def cropped(x: Tensor, grid: Grid, original: Grid) -> Tensor:
    """The tokens (B, N, C) of `grid` that lie in its first corner of `original`'s size."""
    if grid == original:
        return x
    image = x[:, grid.prefix :].unflatten(1, grid.sizes)
    for axis, size in enumerate(original.sizes, start=1):
        image = image.narrow(axis, 0, size)
    return torch.cat([x[:, : grid.prefix], image.flatten(1, grid.ndim)], dim=1)
