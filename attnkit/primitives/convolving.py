"""2-D convolutions over tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnkit.errors import ShapeError
from attnkit.grid import Grid


def narrow(image: Tensor, stride: int) -> Tensor:
    """The same map (B, C, H, W), copied where a strided convolution over it would be trained wrongly.

    In bfloat16 on CPUs, PyTorch leaves a part of the weight's gradient unwritten where the map lies channels last and
    is narrower than the stride.
    """
    if torch.is_grad_enabled() and stride > 1 and image.shape[-1] < stride:
        return image.clone(memory_format=torch.contiguous_format)
    return image


def on_map(module: Callable[[Tensor], Tensor], tokens: Tensor, grid: Grid, token_mask: Tensor | None = None) -> Tensor:
    """Runs a 2-D convolution over the image tokens: (B, N, C) -> (B, H' * W', C'); masked tokens count as zero.

    Raises:
        ShapeError: if the grid has another number of axes than two.
    """
    if grid.ndim != 2:
        raise ShapeError(f"a 2-D convolution needs a grid of height and width, but got {grid}")
    if token_mask is not None:
        tokens = tokens.where(token_mask[..., None], 0.0)
    image = tokens[:, grid.prefix :].transpose(1, 2).unflatten(2, grid.sizes)
    return module(image).flatten(2).transpose(1, 2)
