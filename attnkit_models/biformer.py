"""BiFormer (Zhu et al. 2023, arXiv 2303.08810): attention to the few regions that every region matches best.

The first three stages route between 7 x 7 regions, the last one is dense. The heads of a stage share one routing, and
logits are scaled by the whole width to the power -1/2, as in the authors' code. `stl` has the shapes of Swin-T.
"""

from __future__ import annotations

from typing import Literal

from attnkit.blocks import BlockStyle
from attnkit.mixes import Mix
from attnkit.primitives import Dense, TopKRegion
from attnkit.primitives.base import PrimitiveOptions
from attnkit_models.backbones import ConvNorm, PyramidConfig, Stage

REGIONS = 7
TOPK = (1, 4, 16)
HEAD_DIM = 32
# The dense layers of the authors' code have eight heads at any width.
DENSE_HEADS = 8


def biformer(dim: int, depths: tuple[int, ...], *, drop_path: float = 0.0) -> PyramidConfig:
    """A BiFormer: batch norms between stages, position convolutions in the blocks.

    Args:
        dim: width of the first stage; it doubles from stage to stage.
        depths: blocks of every stage; the last stage is dense.
        drop_path: drop rate of the last block.
    """
    dims = [dim << at for at in range(len(depths))]
    stem = (ConvNorm(dim // 2, 3, 2, norm="batch", activation="gelu"), ConvNorm(dim, 3, 2, norm="batch"))
    merges = [ConvNorm(width, 3, 2, norm="batch") for width in dims]
    return PyramidConfig(
        stem,
        _stages(dims, depths, merges, _dense("x")),
        final_norm="batch",
        block=BlockStyle(mlp_ratio=3.0, position_conv=3),
        drop_path=drop_path,
    )


def biformer_swin_layout(dense: Mix, *, drop_path: float = 0.1) -> PyramidConfig:
    """A BiFormer in the shapes of Swin-T, with one mix for the dense last stage."""
    dims, depths = [96, 192, 384, 768], (2, 2, 6, 2)
    stem = (ConvNorm(dims[0], 4, 4, norm="batch"),)
    merges = [ConvNorm(width, 2, 2, norm="batch", norm_first=True) for width in dims]
    return PyramidConfig(stem, _stages(dims, depths, merges, dense), final_norm="batch", drop_path=drop_path)


def biformer_micro() -> PyramidConfig:
    """For small images and demos: two stages, 32 x 32 pixels."""
    stem = (ConvNorm(24, 3, 2, norm="batch", activation="gelu"), ConvNorm(48, 3, 2, norm="batch"))
    routed = Mix((_routed(2, regions=4, topk=4),))
    dense = Mix((Dense(4, lepe=5, lepe_on="x"),), qkv_bias=False)
    return PyramidConfig(
        stem,
        (Stage(48, 2, routed), Stage(96, 2, dense, merge=ConvNorm(96, 3, 2, norm="batch"))),
        final_norm="batch",
        block=BlockStyle(mlp_ratio=3.0, position_conv=3),
        img_size=32,
    )


def biformer_tiny() -> PyramidConfig:
    """BiFormer-T: 13.1 M parameters, 2.2 G multiply-adds at 224 x 224 pixels."""
    return biformer(64, (2, 2, 8, 2), drop_path=0.1)


def biformer_small() -> PyramidConfig:
    """BiFormer-S: 25.5 M parameters, 4.5 G multiply-adds at 224 x 224 pixels."""
    return biformer(64, (4, 4, 18, 4), drop_path=0.15)


def biformer_base() -> PyramidConfig:
    """BiFormer-B: 56.8 M parameters, 9.8 G multiply-adds at 224 x 224 pixels."""
    return biformer(96, (4, 4, 18, 4), drop_path=0.4)


def biformer_stl() -> PyramidConfig:
    """BiFormer-STL: the shapes of Swin-T; its dense stage convolves the layer's input."""
    return biformer_swin_layout(_dense("x"))


def biformer_stl_nchw() -> PyramidConfig:
    """The authors' second code of BiFormer-STL: its dense stage convolves the values."""
    return biformer_swin_layout(_dense("v"))


def _stages(dims: list[int], depths: tuple[int, ...], merges: list[ConvNorm], dense: Mix) -> tuple[Stage, ...]:
    stages = []
    for at, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        mix = dense if at == len(dims) - 1 else Mix((_routed(dim // HEAD_DIM, REGIONS, TOPK[at]),))
        stages.append(Stage(dim, depth, mix, merge=merges[at] if at else None))
    return tuple(stages)


def _routed(heads: int, regions: int, topk: int) -> PrimitiveOptions:
    return TopKRegion(heads, regions, topk, scale="group", lepe=5)


def _dense(lepe_on: Literal["v", "x"]) -> Mix:
    return Mix((Dense(DENSE_HEADS, lepe=5, lepe_on=lepe_on),), qkv_bias=False)
