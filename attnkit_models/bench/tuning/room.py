"""Room: how large the calls are on which configurations are timed, and their numbers."""

from __future__ import annotations

import torch
from torch import Tensor


class Room:
    """Where a call is made, and how large.

    Args:
        device: where its tensors lie.
        images: images at a time.
        heads: heads of each.
        side: tokens along a side of an image, about.
    """

    def __init__(self, device: torch.device, images: int, heads: int = 8, side: int = 64) -> None:
        self.device, self.images, self.heads, self.side = device, images, heads, side
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers of a normal distribution."""
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers of 0..1."""
        return torch.rand(shape, generator=self._generator, device=self.device)

    def projected(self, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, heads, tokens, width) as a fused projection leaves them."""
        q, k, v = self.normal(self.images, tokens, 3, self.heads, width, dtype=dtype).permute(2, 0, 3, 1, 4)
        return q, k, v
