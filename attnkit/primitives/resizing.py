"""Parameters with one row per token, fitted to a grid of another size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.grid import Grid


def rows_for_grid(rows: Tensor, tokens: int | tuple[int, int], grid: Grid, *, summed: bool) -> Tensor:
    """Rows made for `tokens` image tokens, resized to those of `grid`.

    Height and width, or a square number of tokens, which is taken as a square image, are resized bilinearly; any other
    number as a sequence.

    Args:
        rows: (prefix rows + tokens, r).
        tokens: number of image tokens the rows were made for, or their (height, width).
        grid: the grid at hand; its prefix does not count.
        summed: whether the rows are summed over tokens later; they are then scaled so that the sum keeps its size.

    Returns:
        (image tokens of the grid, r).
    """
    count = tokens if isinstance(tokens, int) else math.prod(tokens)
    image = rows[rows.shape[0] - count :]
    sizes = _image_sizes(tokens) if grid.ndim == 2 else None
    if grid.image_tokens == count if sizes is None else grid.sizes == sizes:
        return image
    columns = image.t()[None]
    columns = columns if columns.dtype == torch.float64 else columns.float()
    if sizes is not None:
        resized = F.interpolate(columns.unflatten(2, sizes), grid.sizes, mode="bilinear", align_corners=False)
    else:
        resized = F.interpolate(columns, grid.image_tokens, mode="linear", align_corners=False)
    resized = resized.flatten(2)[0].t().to(rows.dtype)
    return resized * (count / grid.image_tokens) if summed else resized


def _image_sizes(tokens: int | tuple[int, int]) -> tuple[int, int] | None:
    """Height and width of the image that so many tokens are, or None for a sequence."""
    if not isinstance(tokens, int):
        return tokens
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else None


def trunc_normal(*shape: int) -> torch.nn.Parameter:
    """A parameter drawn from a normal distribution of standard deviation 0.02, cut at two."""
    return torch.nn.Parameter(torch.nn.init.trunc_normal_(torch.zeros(*shape), std=0.02))
