"""Sparsifiner (Wei et al. 2023, arXiv 2303.13755): every query sees the quarter of keys that a small predictor picks.

The shapes are DeiT's and LV-ViT-S's, to whose weights the authors add one predictor a layer. In attnkit the class token
sees every token and is seen by every token; in the authors' code it competes for a place among the keys.
"""

from __future__ import annotations

from attnkit.blocks import BlockStyle
from attnkit.mixes import Mix
from attnkit.primitives import MaskPredictor
from attnkit_models.backbones import ConvNorm, IsotropicConfig

KEEP = 0.25


def sparsifiner_deit(dim: int, depth: int, heads: int) -> IsotropicConfig:
    """A vision transformer in a DeiT's shape with a mask predictor in every layer.

    Args:
        dim: width.
        depth: number of blocks.
        heads: number of heads.
    """
    stem = (ConvNorm(dim, 16, 16, norm="none"),)
    return IsotropicConfig(stem, depth, Mix((MaskPredictor(heads, 196, KEEP, prefix=1),)))


def sparsifiner_micro() -> IsotropicConfig:
    """For small images and demos: 32 x 32 pixels, a convolutional stem as in LV-ViT."""
    return IsotropicConfig(
        (*_convolutions(32, (3, 2), (3, 1)), ConvNorm(72, 2, 2, norm="none")),
        4,
        Mix((MaskPredictor(3, 64, KEEP, prefix=1),)),
        # Twenty epochs of a few thousand images are too short for the small start that DeiT has.
        init="lecun_normal",
        img_size=32,
    )


def sparsifiner_deit_tiny() -> IsotropicConfig:
    """DeiT-Ti with mask predictors: ours, the authors built the small one only."""
    return sparsifiner_deit(192, 12, 3)


def sparsifiner_deit_small() -> IsotropicConfig:
    """DeiT-S with mask predictors: 22.3 M parameters."""
    return sparsifiner_deit(384, 12, 6)


def sparsifiner_deit_base() -> IsotropicConfig:
    """DeiT-B with mask predictors: ours, the authors built the small one only."""
    return sparsifiner_deit(768, 12, 12)


def sparsifiner_lvvit_small() -> IsotropicConfig:
    """LV-ViT-S with mask predictors: 26.4 M parameters; a convolutional stem, halved branches, an auxiliary head."""
    return IsotropicConfig(
        (*lv_vit_stem(64), ConvNorm(384, 8, 8, norm="none")),
        16,
        Mix((MaskPredictor(6, 196, KEEP, prefix=1),), qkv_bias=False),
        block=BlockStyle(mlp_ratio=3.0, norm_eps=1e-5, residual_scale=2.0),
        aux_head=True,
    )


def lv_vit_stem(dim: int) -> tuple[ConvNorm, ...]:
    """The convolutions of LV-ViT's stem, which halve the image, without the one that makes patches."""
    return _convolutions(dim, (7, 2), (3, 1), (3, 1))


def _convolutions(dim: int, *shapes: tuple[int, int]) -> tuple[ConvNorm, ...]:
    """Convolutions of the stem of LV-ViT, given as (kernel, stride)."""
    return tuple(
        ConvNorm(dim, kernel, stride, bias=False, norm="batch", activation="relu") for kernel, stride in shapes
    )
