"""The pyramid: stages of blocks on ever coarser maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from attnkit.blocks import BlockConfig, BlockStyle
from attnkit.grid import Grid
from attnkit.mixes import Mix
from attnkit.options import Options, positive
from attnkit_models.backbones.config import ModelConfig, block_count
from attnkit_models.backbones.features import FeatureInfo
from attnkit_models.backbones.stem import ConvNorm, init_weights, make_norm
from attnkit_models.backbones.vision_model import VisionModel, drop_rates, finished, make_head


@dataclass(frozen=True)
class Stage(Options):
    """Blocks with one mix, behind an optional merge.

    Args:
        dim: width of the blocks' input, >= 1.
        depth: number of blocks, 1 to 1000; exactly 1 where the mix has a stride or another output width.
        mix: the head mix of every block.
        merge: convolution before the blocks, which makes the map coarser.
        block: what the blocks are like beside their mix, where not as in the rest of the model.
    """

    kind: ClassVar[str] = "stage"

    dim: int
    depth: int
    mix: Mix
    _: KW_ONLY
    merge: ConvNorm | None = None
    block: BlockStyle | None = None

    @property
    def out_dim(self) -> int:
        """Width of the blocks' output."""
        return self.mix.out_dim or self.dim

    @property
    def reshapes(self) -> bool:
        """Whether the block itself changes the map's size or width."""
        return self.mix.output_stride != 1 or self.out_dim != self.dim

    def problems(self) -> list[str]:
        found = positive(dim=self.dim) + block_count(self.depth)
        if self.depth > 1 and self.reshapes:
            found.append(f"depth={self.depth}: a stage whose mix has a stride or another output width has one block")
        if self.merge is not None and self.merge.dim != self.dim:
            found.append(f"dim={self.dim}: the merge before the stage gives {self.merge.dim} channels")
        return found


@dataclass(frozen=True)
class PyramidConfig(ModelConfig):
    """A pyramid as data.

    Args:
        stem: convolutions before the first stage, at least one.
        stages: the stages, at least one.
        final_norm: norm before pooling: `"layer"`, `"batch"` or `"none"`.

    The other options are those of `ModelConfig`.
    """

    kind: ClassVar[str] = "pyramid"

    stem: tuple[ConvNorm, ...]
    stages: tuple[Stage, ...]
    _: KW_ONLY
    final_norm: Literal["layer", "batch", "none"] = "layer"

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.stem or not self.stages:
            found.append("stem=..., stages=...: a pyramid needs at least one stem convolution and one stage")
            return found
        if self.global_pool == "token":
            found.append("global_pool='token': a pyramid has no class token; use 'avg' or ''")
        width = self.stem[-1].dim
        for at, stage in enumerate(self.stages):
            if stage.mix.output_scale > 1:
                found.append(f"stages[{at}].mix=...: maps never become finer in a pyramid")
            if stage.merge is None and stage.dim != width:
                found.append(f"stages[{at}].dim={stage.dim}: what comes before gives {width} channels; add a merge")
            width = stage.out_dim
        return found

    def build(self) -> nn.Module:
        """Makes the model."""
        return finished(PyramidModel(self))


class PyramidModel(VisionModel[PyramidConfig]):
    """A hierarchical vision model.

    Args:
        config: its options.
    """

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__(config)
        widths = [config.in_chans, *(layer.dim for layer in config.stem)]
        self.stem = nn.Sequential(*(layer.build(width) for layer, width in zip(config.stem, widths, strict=False)))
        rates = iter(drop_rates(config.drop_path, sum(stage.depth for stage in config.stages)))
        width, layer = config.stem[-1].dim, 0
        self.stages = nn.ModuleList()
        for stage in config.stages:
            self.stages.append(StageLayer(stage, width, stage.block or config.block, rates, layer))
            width, layer = stage.out_dim, layer + stage.depth
        self.num_features = width
        self.norm = make_norm(config.final_norm, width, config.block.norm_eps)
        self.feature_info = _feature_info(config)
        self.apply(partial(init_weights, start=config.init))
        self.head = make_head(width, config.num_classes)

    def levels(self, x: Tensor, draw: Tensor | None = None) -> Iterator[tuple[Tensor, Grid]]:
        x = self.stem(x)
        grid = Grid(*x.shape[2:])
        tokens = x.flatten(2).transpose(1, 2)
        ends = {level["module"] for level in self.feature_info}
        for at, stage in enumerate(self.stages):
            assert isinstance(stage, StageLayer)
            tokens, grid = stage.merged(tokens, grid)
            for block in stage.blocks:
                found = self.run_block(block, tokens, grid, draw)
                tokens, grid = found.x, found.grid
            if f"stages.{at}" in ends:
                yield tokens, grid

    def normed(self, tokens: Tensor, grid: Grid) -> Tensor:
        image = tokens.transpose(1, 2).unflatten(2, grid.sizes)
        return self.norm(image).flatten(2).transpose(1, 2)

    def finish(self, tokens: Tensor, grid: Grid) -> Tensor:
        return self.norm(tokens.transpose(1, 2).unflatten(2, grid.sizes))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        deep = [(r"^stages\.(\d+)\.merge", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else deep}


class StageLayer(nn.Module):
    """The merge and the blocks of one stage."""

    def __init__(self, stage: Stage, width: int, style: BlockStyle, rates: Iterator[float], layer: int) -> None:
        super().__init__()
        self.merge = None if stage.merge is None else stage.merge.build(width)
        look = {field.name: getattr(style, field.name) for field in dataclasses.fields(BlockStyle)}
        self.blocks = nn.ModuleList()
        for at in range(stage.depth):
            block = BlockConfig(stage.mix, dim=stage.dim, **{**look, "drop_path": next(rates)})
            self.blocks.append(block.build(layer + at))

    def merged(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Tokens behind the merge, and how they lie."""
        if self.merge is None:
            return tokens, grid
        image = self.merge(tokens.transpose(1, 2).unflatten(2, grid.sizes))
        return image.flatten(2).transpose(1, 2), Grid(*image.shape[2:])


def _feature_info(config: PyramidConfig) -> FeatureInfo:
    """One level for every size of map: the last stage that has it."""
    reduction, levels = 1, {}
    for layer in config.stem:
        reduction *= layer.stride
    for at, stage in enumerate(config.stages):
        reduction *= (stage.merge.stride if stage.merge is not None else 1) * stage.mix.output_stride
        levels[reduction] = {"num_chs": stage.out_dim, "reduction": reduction, "module": f"stages.{at}"}
    return FeatureInfo(levels.values())
