"""QnA-ViT (Arar et al. 2022, arXiv 2112.11435): windows summarised by learned queries, in place of keys and merges.

A stage holds window attention first (in the late stages, where at 224 x 224 pixels a window covers the map), then
learned-query blocks, then one learned-query block of stride 2 that halves the map and doubles the width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnkit.blocks import BlockStyle
from attnkit.mixes import Mix
from attnkit.primitives import LearnedQuery, Window
from attnkit_models.backbones import ConvNorm, PyramidConfig, Stage

# Width of a head of window attention.
WINDOW_HEAD_DIM = 32


def qna_vit(
    dim: int,
    window_blocks: tuple[int, ...],
    query_blocks: tuple[int, ...],
    *,
    head_dim: int,
    kernel: int = 3,
    windows: tuple[int, ...] = (7, 7, 14, 7),
    window_head_dim: int = WINDOW_HEAD_DIM,
    img_size: int = 224,
    drop_path: float = 0.0,
) -> PyramidConfig:
    """A QnA-ViT without absolute positions.

    Args:
        dim: width of the first stage; it doubles from stage to stage.
        window_blocks: blocks of window attention of every stage.
        query_blocks: learned-query blocks of every stage, not counting the one of stride 2 that ends all but the last.
        head_dim: width of a learned-query head.
        kernel: tokens per side of a learned query's window, odd.
        windows: tokens per side of an attention window, per stage.
        window_head_dim: width of a head of window attention.
        img_size: side of the images it is made for in pixels.
        drop_path: drop rate of the last block.
    """
    stages = []
    for at, (attending, querying) in enumerate(zip(window_blocks, query_blocks, strict=True)):
        width = dim << at
        heads = width // head_dim
        if attending:
            window = Window(width // window_head_dim, windows[at], relative_bias=True)
            stages.append(window_stage(width, attending, window))
        if querying:
            stages.append(query_stage(width, querying, LearnedQuery(heads, kernel)))
        if at < len(window_blocks) - 1:
            stages.append(query_stage(width, 1, LearnedQuery(2 * heads, kernel, stride=2)))
    return pyramid(stages, img_size=img_size, drop_path=drop_path)


def window_stage(dim: int, depth: int, group: Window) -> Stage:
    """Blocks of window attention."""
    return Stage(dim, depth, Mix((group,), qkv_bias=False, proj_bias=False))


def query_stage(dim: int, depth: int, group: LearnedQuery) -> Stage:
    """Learned-query blocks; a stride multiplies the width."""
    out_dim = dim * group.stride
    mix = Mix(
        (group,),
        head_dim=out_dim // group.heads,
        out_dim=out_dim if group.stride > 1 else None,
        qkv_bias=False,
        proj_bias=False,
    )
    return Stage(dim, depth, mix)


def pyramid(stages: Sequence[Stage], *, layer_scale: float | None = None, **options: Any) -> PyramidConfig:
    """The model around the stages: patches of 4 x 4 pixels, MLPs with the tanh approximation of GELU.

    Args:
        stages: the stages.
        layer_scale: see `BlockStyle`.
        **options: those of `PyramidConfig`.
    """
    return PyramidConfig(
        (ConvNorm(stages[0].dim, 4, 4, bias=False, norm="none"),),
        tuple(stages),
        block=BlockStyle(activation="gelu_tanh", layer_scale=layer_scale),
        init="lecun_normal",
        **options,
    )


def qna_vit_micro() -> PyramidConfig:
    """For small images and demos: two stages, 32 x 32 pixels."""
    return qna_vit(48, (0, 2), (2, 0), head_dim=8, windows=(4, 4), window_head_dim=24, img_size=32)


def qna_vit_tiny() -> PyramidConfig:
    """QnA-T: 15.7 M parameters, 2.4 G multiply-adds at 224 x 224 pixels."""
    return qna_vit(64, (0, 0, 4, 2), (2, 3, 2, 0), head_dim=8, drop_path=0.05)


def qna_vit_tiny_7x7() -> PyramidConfig:
    """QnA-T with learned queries that look at 7 x 7 tokens: 15.8 M parameters, 2.5 G multiply-adds."""
    return qna_vit(64, (0, 0, 4, 2), (2, 3, 2, 0), head_dim=8, kernel=7, drop_path=0.05)


def qna_vit_small() -> PyramidConfig:
    """QnA-S: 25.0 M parameters, 4.3 G multiply-adds at 224 x 224 pixels."""
    return qna_vit(64, (0, 0, 12, 2), (2, 3, 6, 0), head_dim=8, drop_path=0.2)


def qna_vit_base() -> PyramidConfig:
    """QnA-B: 55.7 M parameters, 9.5 G multiply-adds at 224 x 224 pixels."""
    return qna_vit(96, (0, 0, 12, 2), (2, 3, 6, 0), head_dim=16, drop_path=0.5)
