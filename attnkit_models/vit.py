"""Dense vision transformers in DeiT's shapes (Touvron et al. 2021, arXiv 2012.12877), as baselines."""

from __future__ import annotations

from attnkit.mixes import Mix
from attnkit.primitives import Dense
from attnkit_models.backbones import ConvNorm, IsotropicConfig


def vit(dim: int, depth: int, heads: int, *, patch: int = 16, img_size: int = 224) -> IsotropicConfig:
    """A dense vision transformer with a class token and learned positions.

    Args:
        dim: width.
        depth: number of blocks.
        heads: number of heads.
        patch: side of a patch in pixels.
        img_size: side of the images it is made for in pixels.
    """
    return IsotropicConfig(
        (ConvNorm(dim, patch, patch, norm="none"),), depth, Mix((Dense(heads),)), img_size=(img_size, img_size)
    )


def vit_micro() -> IsotropicConfig:
    """For small images and demos: 32 x 32 pixels, about as many parameters as `bigbird_vit_micro`."""
    return vit(72, 4, 3, patch=4, img_size=32)


def vit_tiny() -> IsotropicConfig:
    """DeiT-Ti: 5.7 M parameters."""
    return vit(192, 12, 3)


def vit_small() -> IsotropicConfig:
    """DeiT-S: 22.1 M parameters."""
    return vit(384, 12, 6)


def vit_base() -> IsotropicConfig:
    """DeiT-B: 86.6 M parameters."""
    return vit(768, 12, 12)
