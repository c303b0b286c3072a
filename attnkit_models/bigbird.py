"""Vision Big Bird (Zhang and Gong 2023, arXiv 2311.05988): conv, random-window and pooled-global heads side by side.

The paper's table of widths, depths and head splits is not public. The table here is ours, fitted to the totals it
reports at 224 x 224 pixels (T: 29 M parameters and 5.1 G multiply-adds; B: 85 M and 15.8 G); `small` and `micro` have
no counterpart in the paper. The accuracies it reports belong to its own configuration, not to these.
"""

from __future__ import annotations

from attnkit.heads import Mix
from attnkit.primitives import Conv, PooledGlobal, RandomWindow
from attnkit_models.backbones import ConvNorm, PyramidConfig, Stage


def bigbird(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    *,
    pools: tuple[int, ...] = (8, 4, 2, 1),
    window: int = 49,
    stem: ConvNorm | None = None,
    drop_path: float = 0.0,
    img_size: int = 224,
) -> PyramidConfig:
    """A pyramid of Big Bird mixes without any position encoding.

    Args:
        dims: width of every stage.
        depths: blocks of every stage.
        heads: heads of every stage, a multiple of 3: one third each for conv, random windows and pooled keys.
        pools: tokens per side of a pooled cell, per stage.
        window: tokens per random window.
        stem: the first convolution; 7 x 7 with stride 4 where not given.
        drop_path: drop rate of the last block.
        img_size: side of the images it is made for in pixels.
    """
    stages = []
    for at, (dim, depth, count, pool) in enumerate(zip(dims, depths, heads, pools, strict=True)):
        third = count // 3
        groups = (Conv(third), RandomWindow(third, window), PooledGlobal(third, pool))
        merge = ConvNorm(dim, 3, 2) if at else None
        stages.append(Stage(dim, depth, Mix(groups), merge=merge))
    return PyramidConfig((stem or ConvNorm(dims[0], 7, 4),), tuple(stages), drop_path=drop_path, img_size=img_size)


def bigbird_vit_micro() -> PyramidConfig:
    """For small images and demos: two stages, 32 x 32 pixels."""
    stem = ConvNorm(48, 5, 4)
    return bigbird((48, 96), (2, 2), (3, 6), pools=(2, 1), window=16, stem=stem, img_size=32)


def bigbird_vit_tiny() -> PyramidConfig:
    """28.4 M parameters; the paper reports 29 M for its T."""
    return bigbird((72, 144, 288, 576), (2, 4, 18, 2), (3, 6, 12, 24), drop_path=0.2)


def bigbird_vit_small() -> PyramidConfig:
    """50.2 M parameters; between the paper's two."""
    return bigbird((96, 192, 384, 768), (2, 4, 18, 2), (3, 6, 12, 24), drop_path=0.3)


def bigbird_vit_base() -> PyramidConfig:
    """86.1 M parameters; the paper reports 85 M for its B."""
    return bigbird((120, 240, 480, 960), (2, 4, 21, 2), (3, 6, 12, 24), drop_path=0.5)
