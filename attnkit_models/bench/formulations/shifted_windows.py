"""Swin's formulation of shifted windows: the map is rolled, cut, masked where a window joins two edges, rolled back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def shifted_windows(
    q: Tensor, k: Tensor, v: Tensor, sizes: tuple[int, int], window: int, shift: int, seen: Tensor
) -> Tensor:
    """Attention inside windows of a rolled map.

    Args:
        q: (B, heads, N, D), N = height * width.
        k: the same.
        v: the same.
        sizes: height and width in tokens, multiples of `window`.
        window: tokens a side.
        shift: tokens that windows are moved by.
        seen: from `joined`.
    """
    batch, heads, _, width = q.shape

    def cut(one: Tensor) -> Tensor:
        rolled = one.unflatten(2, sizes).roll((-shift, -shift), (2, 3))
        parts = rolled.unflatten(3, (-1, window)).unflatten(2, (-1, window))
        return parts.permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, seen.shape[0], heads, window**2, width)

    near = scaled_dot_product_attention(cut(q), cut(k), cut(v), attn_mask=seen[:, None])
    parts = near.view(batch, sizes[0] // window, sizes[1] // window, heads, window, window, width)
    rolled = parts.permute(0, 3, 1, 4, 2, 5, 6).reshape(batch, heads, *sizes, width)
    return rolled.roll((shift, shift), (2, 3)).flatten(2, 3)


def joined(sizes: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """Which tokens of a window of the rolled map lay beside each other: bool (windows, window ** 2, window ** 2)."""
    # What was rolled over from the other edge belongs to a window of its own.
    own = [
        torch.bucketize(torch.arange(size, device=device), torch.tensor([size - shift], device=device), right=True)
        for size in sizes
    ]
    number = own[0][:, None] * 2 + own[1]
    cut = number.unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2).reshape(-1, window**2)
    return cut[:, :, None] == cut[:, None]
