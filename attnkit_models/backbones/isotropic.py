"""The isotropic backbone: a row of equal blocks on one map."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkit.blocks import BlockConfig, BlockStyle
from attnkit.grid import Grid
from attnkit.mixes import Mix
from attnkit_models.backbones.config import ModelConfig, block_count
from attnkit_models.backbones.features import FeatureInfo
from attnkit_models.backbones.pruning import Tokens, class_weights, kept_count, share_problems
from attnkit_models.backbones.stem import ConvNorm, init_weights
from attnkit_models.backbones.vision_model import VisionModel, drop_rates, finished, make_head


@dataclass(frozen=True)
class IsotropicConfig(ModelConfig):
    """A row of equal blocks as data.

    Args:
        stem: convolutions that turn the image into tokens, at least one.
        depth: number of blocks, 1 to 1000.
        mix: the head mix of every block, or one for each.
        class_token: put a learned token before the image's.
        pos_embed: `"learned"` adds a table of the training size, resized for other sizes; `"none"`.
        aux_head: add half of the largest logit of a second classifier over the image tokens (LV-ViT's evaluation; here
            in training too, because without labels for tokens nothing else would train that classifier).
        keep_tokens: share of the image tokens that each block hands on, one number for each block, in (0, 1] and never
            growing; all where not given. Where a share is smaller than the one before, the tokens stay to which the
            class token attends most in that block, mean over its heads. In training the others are masked; in
            evaluation they are dropped, unless a mix needs all tokens of its grid, which gives the same.

    The other options are those of `ModelConfig`.
    """

    kind: ClassVar[str] = "isotropic"

    stem: tuple[ConvNorm, ...]
    depth: int
    mix: Mix | tuple[Mix, ...]
    _: KW_ONLY
    class_token: bool = True
    pos_embed: Literal["learned", "none"] = "learned"
    aux_head: bool = False
    keep_tokens: tuple[float, ...] = ()
    global_pool: Literal["avg", "token", ""] = "token"

    @property
    def mixes(self) -> tuple[Mix, ...]:
        """The mix of each block."""
        return self.mix if isinstance(self.mix, tuple) else (self.mix,) * self.depth

    @property
    def dim(self) -> int:
        """Width of the blocks."""
        return self.stem[-1].dim

    @property
    def reduction(self) -> int:
        """Pixels per token side."""
        total = 1
        for layer in self.stem:
            total *= layer.stride
        return total

    @property
    def grid(self) -> Grid:
        """How the tokens lie at the size the model is made for."""
        sizes: tuple[int, ...] = self.image
        for layer in self.stem:
            sizes = tuple(-(-size // layer.stride) for size in sizes)
        return Grid(*sizes, prefix=int(self.class_token))

    def problems(self) -> list[str]:
        found = super().problems() + block_count(self.depth)
        if not self.stem:
            found.append("stem=(): an isotropic model needs at least one convolution that makes tokens")
        elif any(
            (one.output_stride, one.output_scale) != (1, 1) or one.out_dim not in (None, self.dim)
            for one in (self.mix if isinstance(self.mix, tuple) else (self.mix,))
        ):
            found.append("mix=...: the blocks of an isotropic model keep their map; use a pyramid for strides")
        if isinstance(self.mix, tuple) and len(self.mix) != self.depth:
            found.append(f"mix=...: {len(self.mix)} mixes for {self.depth} blocks; give one for each, or one for all")
        if self.global_pool == "token" and not self.class_token:
            found.append("global_pool='token': there is no class token; use 'avg' or class_token=True")
        if self.aux_head and not self.class_token:
            found.append("aux_head=True: goes with class_token=True")
        found += share_problems(self.keep_tokens, self.depth)
        if self.keep_tokens and (not self.class_token or self.aux_head or self.global_pool == "avg"):
            found.append(
                f"keep_tokens={list(self.keep_tokens)}: goes with class_token=True, and with neither aux_head=True nor "
                f"global_pool='avg', to which tokens that are gone would matter"
            )
        return found

    def build(self) -> nn.Module:
        """Makes the model."""
        return finished(IsotropicModel(self))


class IsotropicModel(VisionModel[IsotropicConfig]):
    """A vision transformer whose blocks all work on the same map.

    Args:
        config: its options.
    """

    def __init__(self, config: IsotropicConfig) -> None:
        super().__init__(config)
        dim = config.dim
        widths = [config.in_chans, *(layer.dim for layer in config.stem)]
        self.stem = nn.Sequential(*(layer.build(width) for layer, width in zip(config.stem, widths, strict=False)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.pos_embed = None
        if config.pos_embed == "learned":
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, config.grid.tokens, dim), std=0.02))
        look = {field.name: getattr(config.block, field.name) for field in dataclasses.fields(BlockStyle)}
        self.blocks = nn.ModuleList()
        rates = drop_rates(config.drop_path, config.depth)
        for at, (mix, rate) in enumerate(zip(config.mixes, rates, strict=True)):
            self.blocks.append(BlockConfig(mix, dim=dim, **{**look, "drop_path": rate}).build(at))
        self.norm = nn.LayerNorm(dim, eps=config.block.norm_eps)
        self.num_features = dim
        self.feature_info = FeatureInfo(
            {"num_chs": dim, "reduction": config.reduction, "module": f"blocks.{at}"} for at in range(config.depth)
        )
        self.apply(partial(init_weights, start=config.init))
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.head = make_head(dim, config.num_classes)
        self.aux_head = make_head(dim, config.num_classes) if config.aux_head else None

    def levels(self, x: Tensor, draw: Tensor | None = None) -> Iterator[tuple[Tensor, Grid]]:
        for tokens in self.steps(x, draw):
            yield tokens.whole(), tokens.grid

    def steps(self, x: Tensor, draw: Tensor | None = None) -> Iterator[Tokens]:
        """Yields the tokens behind every block and says which of them are left; arguments as in `levels`."""
        x = self.stem(x)
        grid = Grid(*x.shape[2:], prefix=0 if self.cls_token is None else 1)
        rows = x.flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            rows = torch.cat([self.cls_token.expand(rows.shape[0], -1, -1).to(rows.dtype), rows], dim=1)
        if self.pos_embed is not None:
            rows = rows + resized_positions(self.pos_embed, self.config.grid, grid)
        tokens, kept = Tokens(rows, grid), 1.0
        drop = not self.training and all(block.accepts_places() for block in self.blocks)  # type: ignore[operator]
        for block, keep in zip(self.blocks, self.config.keep_tokens or (1.0,) * len(self.blocks), strict=True):
            fewer = keep < kept and kept_count(keep, grid) < kept_count(kept, grid)
            more = {"token_mask": tokens.token_mask, "places": tokens.places, "prefix_weights": fewer}
            found = self.run_block(block, tokens.x, grid, draw, **more)
            tokens = replace(tokens, x=found.x)
            if fewer:
                weights = class_weights(found.aux, grid.prefix)
                tokens, kept = tokens.best(weights, kept_count(keep, grid), drop=drop), keep
            elif tokens.token_mask is not None:
                tokens = replace(tokens, x=found.x.where(tokens.token_mask[..., None], 0.0))
            yield tokens

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The features of `forward_features`, and which tokens are left at the end.

        Args:
            x: images (B, in_chans, H, W).

        Returns:
            Tokens (B, N, C) behind the final norm, and bool (B, N), also where an image is so small that nothing is
            dropped; None for models without `keep_tokens`.
        """
        self.check_images(x)
        last: Tokens | None = None
        for last in self.steps(x):  # noqa: B007 - only the last step is kept alive
            pass
        assert last is not None
        features, left = self.finish(last.whole(), last.grid), last.left()
        if left is None and self.config.keep_tokens:
            left = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        return features, left

    def normed(self, tokens: Tensor, grid: Grid) -> Tensor:
        return self.norm(tokens)

    def finish(self, tokens: Tensor, grid: Grid) -> Tensor:
        return self.norm(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        prefix = 0 if self.cls_token is None else 1
        if self.global_pool == "token":
            pooled = x[:, 0]
        elif self.global_pool == "avg":
            pooled = x[:, prefix:].mean(1)
        else:
            return x
        if pre_logits:
            return pooled
        logits = self.head(pooled)
        if self.aux_head is not None and self.num_classes:
            logits = logits + 0.5 * self.aux_head(x[:, prefix:]).amax(1)
        return logits

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        classifier = "head" if self.aux_head is None else ("head", "aux_head")
        return {**super().pretrained_cfg, "classifier": classifier}

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        before = self.config.grid
        super().set_input_size(img_size)
        if self.pos_embed is not None:
            with torch.no_grad():
                table = resized_positions(self.pos_embed, before, self.config.grid)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.aux_head is not None:
            weight = self.norm.weight
            self.aux_head = make_head(self.num_features, num_classes).to(weight.device, weight.dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stem|^cls_token|^pos_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


def resized_positions(table: Tensor, made_for: Grid, grid: Grid) -> Tensor:
    """A position table (1, N, C), bicubically resized where the map has another size than the table was made for."""
    if grid.sizes == made_for.sizes:
        return table
    prefix, image = table[:, : grid.prefix], table[:, grid.prefix :]
    image = image.transpose(1, 2).unflatten(2, made_for.sizes).float()
    image = F.interpolate(image, grid.sizes, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix, image.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
