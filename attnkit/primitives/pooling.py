"""Means over cells of the grid, without the tokens that do not exist."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.grid import Grid
from attnkit.layouts.cache import cached


def cell_means(
    tokens: Tensor, grid: Grid, cells: tuple[int, ...], lengths: tuple[int, ...], token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean of the image tokens in every cell of the grid.

    Args:
        tokens: (B, N, C), prefix included (it takes no part).
        grid: how the N tokens lie.
        cells: number of cells along each axis.
        lengths: tokens of a cell along each axis, with cells * lengths >= size.
        token_mask: bool (B, N); tokens where it is False take no part.

    Returns:
        Means (B, cells, C), row-major, 0 for cells without a token; and the number of tokens in each, (B or 1, cells).
        Sums and numbers are float32 for half precisions, which overflow or stop counting within a large cell.
    """
    image = tokens[:, grid.prefix :]
    precise = torch.promote_types(tokens.dtype, torch.float32)
    if token_mask is None:

        def make() -> tuple[Tensor, Tensor]:
            everywhere = torch.ones(1, grid.image_tokens, dtype=precise, device=tokens.device)
            return _counted(everywhere, grid, cells, lengths)

        counts, divisors = cached(("cells", grid, cells, lengths, precise, str(tokens.device)), make)
    else:
        inside = token_mask[:, grid.prefix :]
        image = image.where(inside[..., None], 0.0)
        counts, divisors = _counted(inside.to(precise), grid, cells, lengths)
    return (_cell_sums(image, grid, cells, lengths, precise) / divisors).to(tokens.dtype), counts


def _counted(present: Tensor, grid: Grid, cells: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Tokens in each cell, (B or 1, cells), and what their sums are divided by, (B or 1, cells, 1)."""
    counts = _cell_sums(present[..., None], grid, cells, lengths, present.dtype)
    return counts[..., 0], counts.clamp(min=1.0)


def _cell_sums(
    image: Tensor, grid: Grid, cells: tuple[int, ...], lengths: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    map_ = image.unflatten(1, grid.sizes)
    pad = [0, 0]
    for size, count, length in zip(reversed(grid.sizes), reversed(cells), reversed(lengths), strict=True):
        pad += [0, count * length - size]
    if any(pad):
        map_ = F.pad(map_, pad)
    for axis, (count, length) in enumerate(zip(cells, lengths, strict=True)):
        map_ = map_.unflatten(1 + axis, (count, length)).sum(2 + axis, dtype=dtype)
    return map_.flatten(1, grid.ndim)
