"""What primitives write out by hand as the measure of their own code: slow, plain, and never run in a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkit.grid import Grid
from attnkit.primitives.base import HeadInputs
from attnkit.primitives.softmax import SoftmaxHeads


def softmax_heads(
    group: SoftmaxHeads,
    inputs: HeadInputs,
    attention: Callable[..., Tensor],
    keys: tuple[Tensor, Tensor] | None = None,
    **how: Any,
) -> Tensor:
    """`written_out` of a softmax primitive.

    Args:
        group: its heads.
        inputs: as in `written_out`.
        attention: as in `written_out`.
        keys: keys and values, where they are not the tokens' own.
        **how: what else `attention` takes: `bias` or `sees`.
    """
    options, q = group.options, inputs.q
    assert q is not None
    named = {"head": q.shape[3], "group": q.shape[1] * q.shape[3]}
    scale = named[options.scale] ** -0.5 if isinstance(options.scale, str) else options.scale
    out = attention(q, *(keys or (inputs.k, inputs.v)), scale=scale, **how)
    if group.lepe is None:
        return out
    tokens = inputs.x if options.lepe_on == "x" or inputs.v is None else merged(inputs.v)
    prefix, local = inputs.grid.prefix, depthwise(group.lepe, tokens, inputs.grid, inputs.token_mask)
    return torch.cat([out[:, :, :prefix], out[:, :, prefix:] + split(local, q.shape[1])], dim=2)


def merged(heads: Tensor) -> Tensor:
    """(B, heads, N, D) -> (B, N, heads * D), the first head's channels first."""
    return torch.cat(heads.unbind(1), dim=-1)


def split(channels: Tensor, heads: int) -> Tensor:
    """(B, N, heads * D) -> (B, heads, N, D), the inverse of `merged`."""
    return torch.stack(channels.chunk(heads, dim=-1), dim=1)


def depthwise(conv: nn.Conv2d, tokens: Tensor, grid: Grid, token_mask: Tensor | None) -> Tensor:
    """A depthwise convolution tap by tap: (B, N, C) -> (B, H' * W', C); masked tokens and the outside count as zero."""
    (rows, columns), (down, right) = conv.kernel_size, conv.stride
    if token_mask is not None:
        tokens = tokens.where(token_mask[..., None], 0.0)
    height, width = grid.sizes
    image = tokens[:, grid.prefix :].unflatten(1, (height, width))
    image = F.pad(image, (0, 0, columns // 2, columns // 2, rows // 2, rows // 2))
    total = torch.zeros_like(tokens[:, :1, None]) if conv.bias is None else conv.bias
    for row, column in itertools.product(range(rows), range(columns)):
        seen = image[:, row : row + height : down, column : column + width : right]
        total = total + conv.weight[:, 0, row, column] * seen
    return total.flatten(1, 2)


def resized(rows: Tensor, tokens: int | tuple[int, int], grid: Grid) -> Tensor:
    """The last `tokens` rows of (prefix rows + tokens, r) interpolated to the image tokens of a grid, in float64.

    Linearly between the centres of the places: per axis if `tokens` are height and width or the number of a square
    image, else along the row of tokens.
    """
    sizes = tokens
    if isinstance(tokens, int):
        sizes = next(((side, side) for side in range(1, tokens + 1) if side * side == tokens), (tokens,))
    assert isinstance(sizes, tuple)
    count = math.prod(sizes)
    image = rows[len(rows) - count :].double()
    if grid.ndim != 2 or len(sizes) == 1:
        return _hats(count, grid.image_tokens) @ image
    height, width = (_hats(old, new) for old, new in zip(sizes, grid.sizes, strict=True))
    return torch.einsum("ya,xb,abr->yxr", height, width, image.unflatten(0, sizes)).flatten(0, 1)


def _hats(old: int, new: int) -> Tensor:
    """What each of `old` places along an axis weighs in each of `new` ones: (new, old)."""
    place = ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5).clamp(0, old - 1)
    return (1.0 - (place[:, None] - torch.arange(old)).abs()).clamp(min=0.0)
