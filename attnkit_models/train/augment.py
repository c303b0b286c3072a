"""Light augmentation: each training image is turned, shifted and zoomed by amounts of its epoch and index."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit_models.train.seeds import seed_of


@functools.lru_cache(maxsize=2)
def _draws(seed: int, epoch: int, count: int, device: torch.device) -> Tensor:
    """Uniform numbers in [-1, 1), (count, 5): one row an image, whatever batch or process it ends up in."""
    generator = torch.Generator().manual_seed(seed_of("augmentation", seed, epoch))
    return (torch.rand(count, 5, generator=generator) * 2 - 1).to(device)


@dataclass(frozen=True)
class Augmentation:
    """Random affine maps, one an image and epoch.

    Args:
        degrees: largest turn in either direction.
        shift: largest shift as a share of height and width.
        zoom: largest change of scale, such as 0.1 for 0.9 to 1.1.
        mirror: swap left and right in half of the cases.
        border: what lies outside of the image, "zeros" (black) or "reflection".
    """

    degrees: float
    shift: float
    zoom: float
    mirror: bool
    border: Literal["zeros", "reflection"]

    def __call__(self, images: Tensor, index: Tensor, *, count: int, seed: int, epoch: int) -> Tensor:
        """Varies a batch.

        Args:
            images: (B, channels, H, W) with values in [0, 1].
            index: each image's place in the training set, (B,).
            count: size of the training set.
            seed: of the run.
            epoch: counted from 0.

        Returns:
            The varied images, same shape and dtype.
        """
        draw = _draws(seed, epoch, count, images.device)[index].to(images.dtype)
        angle = draw[:, 0] * math.radians(self.degrees)
        scale = 1 + draw[:, 1] * self.zoom
        flip = torch.where(draw[:, 4] < 0, -1.0, 1.0) if self.mirror else torch.ones_like(scale)
        # affine_grid counts in half image sides, so a turn of a non-square image needs its aspect.
        aspect = images.shape[-2] / images.shape[-1]
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        top = torch.stack([flip * cos, -flip * sin * aspect, draw[:, 2] * 2 * self.shift], dim=1)
        bottom = torch.stack([sin / aspect, cos, draw[:, 3] * 2 * self.shift], dim=1)
        where = F.affine_grid(torch.stack([top, bottom], dim=1), list(images.shape), align_corners=False)
        return F.grid_sample(images, where, mode="bilinear", padding_mode=self.border, align_corners=False)
