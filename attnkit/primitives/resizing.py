"""Parameters with one row per token, fitted to a grid of another size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.grid import Grid


def rows_for_grid(rows: Tensor, tokens: int, grid: Grid, *, summed: bool) -> Tensor:
    """Rows made for `tokens` image tokens, resized to those of `grid`.

    A square number of tokens is taken as a square image and resized bilinearly; any other as a sequence.

    Args:
        rows: (prefix rows + tokens, r).
        tokens: number of image tokens the rows were made for.
        grid: the grid at hand; its prefix does not count.
        summed: whether the rows are summed over tokens later; they are then scaled so that the sum keeps its size.

    Returns:
        (image tokens of the grid, r).
    """
    image = rows[rows.shape[0] - tokens :]
    side = math.isqrt(tokens)
    square = side * side == tokens and grid.ndim == 2
    if (grid.sizes == (side, side)) if square else grid.image_tokens == tokens:
        return image
    columns = image.t()[None]
    columns = columns if columns.dtype == torch.float64 else columns.float()
    if square:
        resized = F.interpolate(columns.unflatten(2, (side, side)), grid.sizes, mode="bilinear", align_corners=False)
    else:
        resized = F.interpolate(columns, grid.image_tokens, mode="linear", align_corners=False)
    resized = resized.flatten(2)[0].t().to(rows.dtype)
    return resized * (tokens / grid.image_tokens) if summed else resized


def trunc_normal(*shape: int) -> torch.nn.Parameter:
    """A parameter drawn from a normal distribution of standard deviation 0.02, cut at two."""
    return torch.nn.Parameter(torch.nn.init.trunc_normal_(torch.zeros(*shape), std=0.02))
